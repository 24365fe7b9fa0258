"""rgap inside other people's frameworks. Each module needs the extra of its name, such as ``rgap[flower]``."""
