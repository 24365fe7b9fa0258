"""The verdict in plain words, with the numbers behind it. It says what was tried; it never says "safe"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rgap.attacks import Status
from rgap.attacks.last_layer import obstacle
from rgap.auditing.dose_response import DoseResponse, Response
from rgap.auditing.findings import mode
from rgap.auditing.readout import ReadOut
from rgap.auditing.results import EXACT_PSNR, FOUND_FREE, RECOGNISABLE_PSNR, RECOGNISABLE_SSIM, Case, Level
from rgap.auditing.run import Ended
from rgap.checks import changes_with_mode
from rgap.rank import RankAnalysis
from rgap.rank.summary import percent
from rgap.target import Target

WEAK_EPSILON = 10.0
"""Above it differential privacy guarantees next to nothing: what the server sees may be e^10 = 22,000 times as likely
with the update as without it."""
WEAK = (
    "But its epsilon is above {:g}, where differential privacy guarantees next to nothing: that no sample was "
    "recognisable holds for the attacks tried, and for no others."
)
UNCOUNTED = (
    "But no epsilon was counted, so that it is not known what is guaranteed: that no sample was recognisable holds "
    "for the attacks tried, and for no others. With --dp-rate and --dp-steps it is counted."
)


@dataclass(frozen=True)
class LayerNote:
    """The layer that gives the input away, or protects it."""

    name: str
    role: str
    """``gives away`` or ``protects``."""
    why: str


@dataclass(frozen=True)
class Advice:
    """What to change; tried on these samples."""

    what: str
    why: str
    before: Response
    after: Response


@dataclass(frozen=True)
class Verdict:
    level: Level
    headline: str
    findings: tuple[str, ...]
    """What makes the audit mean something else than its reader may think."""
    sentences: tuple[str, ...]
    layer: LayerNote | None
    advice: tuple[Advice, ...]
    limits: tuple[str, ...]


def verdict(
    cases: Sequence[Case],
    sweeps: Sequence[DoseResponse],
    rank: RankAnalysis | None,
    target: Target,
    read: ReadOut | None = None,
    ended: Ended = Ended.WHOLE,
    found: Sequence[str] = (),
    bound: str = "",
) -> Verdict:
    """What the results mean for someone who must decide.

    Args:
        read: what the updates gave away before any attack.
        ended: what kept an attack from finding what it might still have found, if anything did.
        found: what makes the audit mean something else than its reader may think.
        bound: what keeps the local steps of every client from being undone, with its numbers; empty: nothing known.
    """
    count = len(cases)
    exact = sum(case.level is Level.EXACT for case in cases)
    seen = sum(case.level is not Level.NOTHING for case in cases)
    tried = any(case.results for case in cases)
    unknown = [case.name for case in cases if case.truth is None]
    zero = tried and all(r.status is Status.GRADIENT_ZERO for case in cases for r in case.results)
    if zero:
        level, headline = Level.NOTHING_SENT, "The updates hold nothing: every gradient is zero."
    elif not tried:
        level = Level.NOTHING
        headline = "No attack ran: this says nothing about what the updates give away."
        if read is not None and read.counts:
            headline = "How often each label occurs is estimated. No attack ran, which might give more away."
    elif exact:
        level, headline = Level.EXACT, _many(exact, count, "can be read out of the update exactly")
    elif seen:
        level = Level.RECOGNISABLE
        known = any(case.truth is not None for case in cases if case.level is not Level.NOTHING)
        how = "can be recognised in" if known else "was found, up to what no constraint decides, in"
        headline = _many(seen, count, f"{how} what the update gives away")
    elif unknown:
        level = Level.NOTHING
        headline = f"{_none(count)} certainly recovered: nobody here knows the sample{'s' if count > 1 else ''}."
    else:
        level = Level.NOTHING
        headline = f"{_none(count)} recovered by the attacks that were tried."
    told, apart = "" if read is None else read.told, _told_apart(cases)
    read_off = apart or told
    if level is Level.NOTHING and read_off:
        headline = headline if tried else "No attack ran, which might give more away."
        headline = f"{read_off[0].upper()}{read_off[1:]} were read off; {headline[0].lower()}{headline[1:]}"
    return Verdict(
        level,
        headline if exact == count else _so_far(headline, ended, seen > 0 or bool(read_off), "" if zero else bound),
        tuple(found),
        tuple(_sentences(cases, exact, seen, read, target)),
        _layer(rank, seen > 0, ended is not Ended.WHOLE),
        tuple(_advice(sweeps)) if seen else (),
        (*_limits(target), *_unknown(unknown, count)),
    )


def _so_far(headline: str, ended: Ended, leaked: bool, bound: str) -> str:
    """The headline, which is no result where an attack might still have found more; what leaked comes first, then the
    bound, which more time does not move."""
    if bound and not leaked:
        why = f"{bound[0].upper()}{bound[1:]}: the local steps cannot be undone one by one."
        if ended is Ended.WHOLE:
            return f"{why} {headline}"
        how = "The time was up" if ended is Ended.TIME else "The audit was interrupted"
        return f"{why} So far {headline[0].lower()}{headline[1:]} {how} before every attack had ended."
    if ended is Ended.WHOLE:
        return headline
    how = "he time was up" if ended is Ended.TIME else "he audit was interrupted"
    if leaked:
        return f"{headline[:-1]}, and t{how} before every attack had ended."
    return f"T{how} before every attack had ended. So far: {headline[0].lower()}{headline[1:]}"


def _none(count: int) -> str:
    return f"None of the {count} samples was" if count > 1 else "The sample was not"


def _many(some: int, count: int, what: str) -> str:
    if some == count:
        return f"Every sample {what}." if count > 1 else f"The sample {what}."
    return f"{some} of {count} samples {what}."


def _sentences(cases: Sequence[Case], exact: int, seen: int, read: ReadOut | None, target: Target) -> list[str]:
    count = len(cases)
    others = sum(case.truth is None and case.level is Level.NOTHING for case in cases)
    parts = [f"{exact} of {count} samples recovered exactly", f"{seen - exact} more recognisably"]
    parts += [f"{count - seen - others} not"] if count > seen + others or not others else []
    parts += [f"{others} cannot be judged without the original{'s' * (others > 1)}"] if others else []
    found = [f"{', '.join(parts)}."] if any(case.results for case in cases) else []
    best = [case.best for case in cases if case.best is not None and case.level is not Level.NOTHING]
    unknown = [r for r in best if not r.compared and r.level is not Level.EXACT]
    if unknown:
        free = max(r.free_share for r in unknown)
        found.append(
            f"Of {len(unknown)} of these nobody here knows the sample: an input was found that has the gradient that "
            f"was sent, and {free:.1%} of its dimensions at the most stay free."
        )
    compared = [r for r in best if r.compared]
    if compared:
        worst = max(compared, key=lambda r: r.psnr)
        found.append(
            f"The sample that came back best: {worst.attack}, {worst.psnr:.0f} dB, mean squared error {worst.mse:.0e}, "
            f"in {f'{worst.seconds:.2g}' if worst.seconds < 10 else f'{worst.seconds:.0f}'} s."
        )
        if all(r.labels_right for r in compared) and not target.loss.aid:
            found.append("The label of each of them was inferred as well; the attack was told nothing.")
    batches = [case for case in cases if any(result.of > 1 for result in case.results)]
    if batches:
        certified = sum(any(result.status is Status.EXACT for result in case.results) for case in batches)
        by = "by the gradient alone, which is of several samples, an attack says of each of them that it is exact"
        why = by if certified else "no attack says of any that it is exact"
        found.append(f"{certified} of {len(batches)} samples certified: {why}.")
    apart = _told_apart(cases)
    if apart:
        found.append(f"Told apart in gradients of several samples, although their inputs are not known: {apart}.")
    found += () if read is None else read.sentences
    if changes_with_mode(target.model):
        found.append(mode(target))
    return found


def _told_apart(cases: Sequence[Case]) -> str:
    """Whose labels and features are known although their inputs are not, for a sentence; empty if nobody's."""
    found = [
        next(result.features for result in case.results if result.features)
        for case in cases
        if case.level is Level.NOTHING
        and any(result.features and result.labels_right is not False for result in case.results)
    ]
    if not found:
        return ""
    whose = f"all {len(cases)}" if len(found) == len(cases) else f"{len(found)} of {len(cases)}"
    layers = " and ".join(dict.fromkeys(found))
    return f"the labels of {whose} samples, exactly, and all values that {layers} reads of each"


def _unknown(names: Sequence[str], count: int) -> tuple[str, ...]:
    """What a reader must know of samples that nobody here knows."""
    if not names:
        return ()
    which = "these samples" if len(names) == count else f"{len(names)} of these samples"
    return (
        f"Nobody here knows {which}: nothing could be compared. They count as exact where a reconstruction's "
        "certificate says so, and as recognisable where it has the gradient that was sent and no more than "
        f"{FOUND_FREE:.0%} of its dimensions stay free; others may show them all the same. Look at them.",
    )


def rank_sentence(rank: RankAnalysis, leaks: bool) -> str:
    """What the ranks say, beside what the attacks found: free dimensions that a prior filled protect nothing."""
    if not leaks or not rank.joint_free:
        return rank.verdict
    size, free = rank.unknowns, rank.joint_free
    return (
        f"The constraints leave {free} of {size} dimensions of the input ({percent(free / size)}) free. That "
        "protected nothing here: the rest was enough, and a prior filled what was free."
    )


def _layer(rank: RankAnalysis | None, leaks: bool, unfinished: bool) -> LayerNote | None:
    """The layer to look at; for chains, whose ranks were measured."""
    if rank is None or not rank.layers:
        return None
    protecting = rank.protecting
    if protecting is not None and not leaks and not unfinished:
        why = f"its constraints leave {protecting.free} of the {protecting.unknowns} values that it reads open"
        return LayerNote(protecting.name, "protects", why)
    if leaks and rank.joint_free == 0:
        first = rank.layers[0]
        why = (
            f"{first.gradient_rows} gradient and {first.weight_rows} weight constraints stand against the "
            f"{first.unknowns} values that it reads, and no layer behind it leaves them open"
        )
        return LayerNote(first.name, "gives away", why)
    return None


def _advice(sweeps: Sequence[DoseResponse]) -> list[Advice]:
    """Of each defence that closed the leak, the weakest strength that did, the cheapest first."""
    found = []
    for sweep in sweeps:
        after = sweep.closes_at
        if after is not None:
            what = f"{sweep.name} with {sweep.strength_name} {after.strength:g}"
            why = " ".join([sweep.about, *_caveat(sweep, after)])
            found.append(Advice(what, why, sweep.points[0], after))
    return sorted(found, key=lambda each: each.after.gradient_error)


def _caveat(sweep: DoseResponse, after: Response) -> tuple[str, ...]:
    """What a promise of differential privacy must not be taken for."""
    if not sweep.private:
        return ()
    if after.epsilon is None:
        return (UNCOUNTED,)
    return (WEAK.format(WEAK_EPSILON),) if after.epsilon > WEAK_EPSILON else ()


def _limits(target: Target) -> tuple[str, ...]:
    limits = [
        "This says what was tried on these samples with these weights. Another attack, another checkpoint or another "
        "sample may give more away; no result here means that a model is safe.",
        f"Exact: the recomputed gradient agrees and the peak signal-to-noise ratio is {EXACT_PSNR:g} dB or more. "
        f"Recognisable: {RECOGNISABLE_PSNR:g} dB or more, or a structural similarity of {RECOGNISABLE_SSIM:g} or more.",
        "The server is honest but curious: it sends the right model and looks at what comes back. A server that "
        "changes the model can learn more.",
    ]
    reason = obstacle(target)
    if reason is not None:
        limits.append(f"The closed form does not follow this model ({reason}); only the attacks that apply ran.")
    return tuple(limits)
