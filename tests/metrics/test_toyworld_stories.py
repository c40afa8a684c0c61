"""Stories measured from pixels: all right on the truth, wrong exactly where something is wrong, nothing on noise."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive import rng
from longlive.codecs.dct import DCTCodec
from longlive.data.prompts import StoryPrompt
from longlive.data.shots import ChunkSizes
from longlive.data.toyworld import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Scene, render
from longlive.data.toyworld_stories import Story, random_story, render_story
from longlive.metrics.toyworld import ATTRIBUTES
from longlive.metrics.toyworld_stories import ToyWorldStoryAccuracy, find_cuts, returning_shots
from longlive.typing import Video

SIZES = ChunkSizes(4, 4)
STORIES = [random_story(9, sample) for sample in range(20)]
FIRST = Scene("red", "cross", "left", "grey", "quickly", x=20.0, y=40.0)
SECOND = Scene("blue", "circle", "up", "dark", "slowly", x=30.0, y=10.0)
THIRD = replace(FIRST, direction="down", ground="light", speed="slowly")
STORY = Story((FIRST, SECOND, THIRD), (1, 2, 1))
"""Cuts at the raw frames 13 and 45 of 61."""


def videos_of(stories: Sequence[Story]) -> Video:
    return torch.stack([render_story(story, SIZES) for story in stories]).float() / 127.5 - 1


def prompts_of(stories: Sequence[Story]) -> list[StoryPrompt]:
    return [story.prompt("x") for story in stories]


def measured(videos: Video, stories: Sequence[StoryPrompt]) -> dict[str, float]:
    metric = ToyWorldStoryAccuracy()
    metric.update(videos, stories)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("through_codec", [False, True])
def test_the_truth_scores_one(through_codec: bool) -> None:
    """Also through the toy codec, which softens shapes: else a perfect model could not."""
    stories = STORIES[:12] if through_codec else STORIES
    videos = videos_of(stories)
    if through_codec:
        codec = DCTCodec()
        videos = codec.decode(codec.encode(videos))
    result = measured(videos, prompts_of(stories))
    for name in ("cut", "cuts_exact", "identity", "identity_as_generated", *ATTRIBUTES):
        assert result[name] >= 0.99, name
    assert result["false_cuts"] == 0
    assert result["num_videos"] == len(stories)
    assert {f"{attribute}/shot_{shot}" for attribute in ATTRIBUTES for shot in (1, 2, 3)} <= set(result)


def test_noise_scores_nothing() -> None:
    """A rule that only asks for change finds a cut everywhere in noise, the right one too."""
    videos = rng.normal((8, 93, 3, 64, 64), 0, "test_noise").clamp(-1, 1)
    decoded = DCTCodec().decode(rng.normal((8, 24, 16, 8, 8), 0, "test_noise"))
    for video in (videos, decoded):
        result = measured(video, prompts_of(STORIES[:8]))
        for name in ("cut", "cuts_exact", "identity", "identity_as_generated"):
            assert result[name] <= 0.1, name
        for attribute, share in {"colour": 1 / 6, "shape": 1 / 4, "direction": 1 / 4, "ground": 1 / 3}.items():
            assert result[attribute] <= share + 3 * (share * (1 - share) / 24) ** 0.5


def test_one_long_shot_has_no_cut() -> None:
    """And scores what its shots have in common with the story."""
    videos = videos_of([Story((FIRST,), (4,))])
    result = measured(videos, [STORY.prompt("x")])
    assert (result["cut"], result["cuts_exact"], result["false_cuts"]) == (0, 0, 0)
    assert [result[f"colour/shot_{shot}"] for shot in (1, 2, 3)] == [1, 0, 1]
    assert [result[f"direction/shot_{shot}"] for shot in (1, 2, 3)] == [1, 0, 0]
    assert (result["identity"], result["colour"]) == (1, pytest.approx(2 / 3))


def test_a_cut_in_another_chunk_is_a_missed_one_and_a_false_one() -> None:
    videos = videos_of([replace(STORY, durations=(1, 1, 2))])
    result = measured(videos, [STORY.prompt("x")])
    assert (result["cut"], result["false_cuts"], result["cuts_exact"]) == (0.5, 1, 0)


@pytest.mark.parametrize(("shift", "right"), [(-4, 1), (4, 1), (5, 0), (-5, 0)])
def test_a_cut_is_right_within_one_frame_of_its_chunk(shift: int, right: int) -> None:
    """A frame is four raw frames: no generator can be more exact, and half a chunk later is wrong."""
    frames = torch.cat([render(FIRST, 29 + shift), render(SECOND, 32 - shift)])[None].float() / 127.5 - 1
    result = measured(frames, [Story((FIRST, SECOND), (2, 2)).prompt("x")])
    assert (result["cut"], result["false_cuts"]) == (right, 1 - right)


def test_cuts_are_found_where_scenes_change_and_nowhere_else() -> None:
    assert find_cuts(videos_of([STORY])[0]) == [13, 45]
    for ground in GROUNDS:  # nothing stands out from a fast shape's own motion
        assert find_cuts(videos_of([Story((replace(FIRST, ground=ground),), (4,))])[0]) == []
    flicker = videos_of([STORY])[0] * torch.linspace(0.9, 1.0, 61)[torch.randperm(61)][:, None, None, None]
    assert find_cuts(flicker) == [13, 45]
    fade = videos_of([STORY])[0]
    fade[13] = (fade[12] + 2 * fade[13]) / 3
    assert find_cuts(fade) == [13, 45], "one half-way frame makes one cut, not two"


def test_identity_is_kept_only_by_the_subject_that_left() -> None:
    """As generated and as prompted: a wrong subject that returns the same is no success, nor is a right one alone."""
    green = {"colour": "green"}
    cases = [
        (STORY, 1, 1),
        (replace(STORY, scenes=(FIRST, SECOND, replace(THIRD, colour="green"))), 0, 0),
        (replace(STORY, scenes=(FIRST, SECOND, replace(THIRD, shape="square"))), 0, 0),
        (replace(STORY, scenes=(replace(FIRST, **green), SECOND, replace(THIRD, **green))), 0, 1),
        (replace(STORY, scenes=(replace(FIRST, **green), SECOND, THIRD)), 0, 0),
        (replace(STORY, scenes=(FIRST, replace(SECOND, colour="yellow"), THIRD)), 1, 1),
    ]
    for shown, kept, kept_as_generated in cases:
        result = measured(videos_of([shown]), [STORY.prompt("x")])
        assert (result["identity"], result["identity_as_generated"]) == (kept, kept_as_generated)
    empty = torch.full((1, 61, 3, 64, 64), -0.8)
    assert measured(empty, [STORY.prompt("x")])["identity_as_generated"] == 0, "nothing is not the same as nothing"


def test_only_a_subject_that_was_away_returns() -> None:
    captions = [scene.caption() for scene in (FIRST, FIRST, SECOND, THIRD, SECOND, THIRD)]
    assert returning_shots(captions) == [3, 5]
    assert returning_shots(captions[:2]) == []
    same = STORY.scenes[0], replace(FIRST, ground="dark"), THIRD
    assert returning_shots([scene.caption() for scene in same]) == [2], "the same one on another ground lies between"
    result = measured(videos_of([Story((FIRST, SECOND), (2, 2))]), [Story((FIRST, SECOND), (2, 2)).prompt("x")])
    assert not [name for name in result if name.startswith("identity")]
    single = measured(videos_of([Story((FIRST,), (4,))]), [Story((FIRST,), (4,)).prompt("x")])
    assert "cut" not in single
    assert single["cuts_exact"] == 1


@pytest.mark.parametrize("shot", [0, 1, 2])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_what_is_wrong_in_one_shot_is_wrong_there_alone(attribute: str, shot: int) -> None:
    """The prompt of the current shot, not of the video or of its neighbour."""
    names = {"colour": list(COLOURS), "shape": SHAPES, "direction": list(DIRECTIONS), "ground": list(GROUNDS)}
    options = names[attribute]
    scenes = list(STORY.scenes)
    value = getattr(scenes[shot], attribute)
    scenes[shot] = replace(scenes[shot], **{attribute: options[(options.index(value) + 1) % len(options)]})
    result = measured(videos_of([STORY]), [replace(STORY, scenes=tuple(scenes)).prompt("x")])
    for other in ATTRIBUTES:
        for number in range(3):
            assert result[f"{other}/shot_{number + 1}"] == (not (other == attribute and number == shot))
        assert result[other] == pytest.approx(2 / 3 if other == attribute else 1)


def test_stories_of_any_number_of_shots_are_counted_per_shot() -> None:
    stories = [STORY, Story((SECOND, FIRST), (2, 2)), Story((SECOND,), (4,))]
    prompts = [*prompts_of(stories[:2]), Story((FIRST,), (4,)).prompt("x")]
    result = measured(videos_of(stories), prompts)
    assert result["colour"] == pytest.approx(5 / 6), "of six shots"
    assert [result[f"colour/shot_{shot}"] for shot in (1, 2, 3)] == [pytest.approx(2 / 3), 1, 1]
    assert "colour/shot_4" not in result


def _accuracy_of_this_rank(parts: Sequence[tuple[Video, Sequence[StoryPrompt]]]) -> dict[str, Any]:
    metric = ToyWorldStoryAccuracy()
    metric.update(*parts[dist.get_rank()])
    return metric.compute()


def test_ranks_and_batches_add_up_to_the_whole() -> None:
    """With shots of another number on each rank, which lists of results could not be gathered."""
    stories = [STORY, Story((SECOND, FIRST), (2, 2)), Story((SECOND,), (4,))]
    videos, prompts = videos_of(stories), prompts_of([*stories[:2], Story((FIRST,), (4,))])
    whole = measured(videos, prompts)
    parts, other = ToyWorldStoryAccuracy(), ToyWorldStoryAccuracy()
    parts.update(videos[:1], prompts[:1])
    other.update(videos[1:], prompts[1:])
    parts.merge_state(other)
    assert {name: pytest.approx(float(value)) for name, value in parts.compute().items()} == whole
    parts.reset()
    assert int(parts.num_videos) == 0
    for result in run_on_ranks(_accuracy_of_this_rank, 2, [(videos[:2], prompts[:2]), (videos[2:], prompts[2:])]):
        assert {name: pytest.approx(float(value)) for name, value in result.items()} == whole


def test_stories_that_do_not_fit_their_videos_are_refused() -> None:
    videos = videos_of([STORY])
    with pytest.raises(ValueError, match="1 videos and 2 stories"):
        ToyWorldStoryAccuracy().update(videos, prompts_of([STORY, STORY]))
    with pytest.raises(ValueError, match="is no story that says how many chunks"):
        ToyWorldStoryAccuracy().update(videos, [replace(STORY.prompt("x"), durations=None)])
    with pytest.raises(ValueError, match="'a red cross' is no story"):
        ToyWorldStoryAccuracy().update(videos, ["a red cross"])
    with pytest.raises(ValueError, match=r"3 shots and 77 raw frames, its video has 61"):
        ToyWorldStoryAccuracy().update(videos, [replace(STORY, durations=(1, 2, 2)).prompt("x")])
    with pytest.raises(ValueError, match="chunk_frames=0"):
        ToyWorldStoryAccuracy(chunk_frames=0)
