"""Prompt switches: where the prompt of a video changes within a shot, and what the cache answers to then.

Keys and values of earlier chunks carry the prompt that they were written under. At a scene cut that is right: they are
of another scene. Where the prompt changes and the scene goes on, they hold the video to the old prompt. *KV-recache*
(LongLive 1.0, arXiv 2509.22622) writes them anew under the new one: the finished frames of the shot, as far as the
coming chunk sees them, pass through the network again, the earliest first, each seeing those before it. Chunks of
earlier shots stay as they are.

The first chunk of a shot after a cut has the scene-cut phrase before its caption, and the next one has not: that is no
switch. So none is seen between these two.
"""

from collections.abc import Sequence


def switches(chunk: int, prompts: Sequence[int], shot_index: Sequence[int]) -> bool:
    """Whether the prompt of a sample switches at a chunk.

    Args:
        chunk: index in the video.
        prompts: which prompt every chunk follows, at least up to `chunk`.
        shot_index: shot of every chunk, likewise.
    """
    if chunk == 0 or shot_index[chunk] != shot_index[chunk - 1]:
        return False
    after_cut = chunk > 1 and shot_index[chunk - 1] != shot_index[chunk - 2]
    return prompts[chunk] != prompts[chunk - 1] and not after_cut


def count_switches(prompts: Sequence[Sequence[int]], shot_index: Sequence[Sequence[int]]) -> list[int]:
    """At every chunk, how many of the samples switch; arguments as `switches`, per sample."""
    rows = list(zip(prompts, shot_index, strict=True))
    return [sum(switches(chunk, *row) for row in rows) for chunk in range(len(prompts[0]))]


def cached_prompts(chunk: int, prompts: Sequence[int], shot_index: Sequence[int]) -> list[int]:
    """The prompts that the chunks before `chunk` are cached under when it begins, if the cache is rebuilt at switches.

    Arguments as `switches`.
    """
    cached: list[int] = []
    for current in range(chunk + 1):
        if switches(current, prompts, shot_index):
            cached = [
                prompts[current] if shot_index[earlier] == shot_index[current] else prompt
                for earlier, prompt in enumerate(cached)
            ]
        cached.append(prompts[current])
    return cached[:chunk]
