"""Stories whose truth is known: who appears when, where the cuts are, and that training sees them there."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longlive.config import compose, instantiate
from longlive.data.indexed import IndexedShards
from longlive.data.prompts import StoryPrompt
from longlive.data.sample import ClipSpec
from longlive.data.shards import write_shards
from longlive.data.shots import ChunkSizes, check_shots
from longlive.data.toyworld import Scene, parse_caption, render
from longlive.data.toyworld_stories import Story, ToyWorldStories, random_story, random_story_prompts, render_story

SIZES = ChunkSizes(4, 4)
STORIES = [random_story(0, sample) for sample in range(300)]


def subject(scene: Scene) -> tuple[str, str]:
    return scene.colour, scene.shape


def test_the_first_subject_returns_after_another_or_itself_on_another_ground() -> None:
    for story in STORIES:
        assert subject(story.scenes[0]) == subject(story.scenes[2])
        assert all(scene.ground != following.ground for scene, following in pairwise(story.scenes))
    same = sum(subject(story.scenes[0]) == subject(story.scenes[1]) for story in STORIES)
    assert abs(same - 150) < 3 * (300 / 4) ** 0.5, "as often another one as the same"
    others = Counter(
        (story.scenes[0].colour == story.scenes[1].colour, story.scenes[0].shape == story.scenes[1].shape)
        for story in STORIES
        if subject(story.scenes[0]) != subject(story.scenes[1])
    )
    assert set(others) == {(True, False), (False, True), (False, False)}


def test_longer_stories_go_on_alike() -> None:
    story = random_story(0, 5, num_shots=5, num_chunks=7)
    assert len({subject(story.scenes[shot]) for shot in (0, 2, 4)}) == 1
    assert sum(story.durations) == 7
    assert min(story.durations) >= 1


def test_directions_and_speeds_are_drawn_anew_in_every_shot() -> None:
    """A model that copies them from the shot before must fail."""
    for attribute, chance in (("direction", 1 / 4), ("speed", 1 / 2)):
        same = [getattr(story.scenes[0], attribute) == getattr(story.scenes[2], attribute) for story in STORIES]
        assert abs(sum(same) / 300 - chance) < 3 * (chance * (1 - chance) / 300) ** 0.5


def test_all_lengths_of_shots_occur_evenly() -> None:
    counts = Counter(story.durations for story in STORIES)
    assert len(counts) == 10, "the ways to write 6 as an ordered sum of 3"
    assert sum((count - 30) ** 2 / 30 for count in counts.values()) < 27.9, "9 degrees of freedom, p = 0.001"


def test_cuts_lie_on_the_borders_of_chunks() -> None:
    """The first chunk of 4 frames has 13 raw frames, the others have 16."""
    source = ToyWorldStories(num_clips=20, num_chunks=4, num_shots=2)
    for index in range(20):
        story, clip = random_story(0, index, num_shots=2, num_chunks=4), source[index]
        check_shots(clip.shots, 61)
        assert len(clip.frames) == 61
        assert clip.shots[1].start == clip.shots[0].end == {1: 13, 2: 29, 3: 45}[story.durations[0]]
        for shot, scene in zip(clip.shots, story.scenes, strict=True):
            assert torch.equal(clip.frames[shot.start : shot.end], render(scene, shot.end - shot.start))
            said = parse_caption(shot.caption)
            assert (subject(said), said.direction, said.ground) == (subject(scene), scene.direction, scene.ground)
        jumps = (clip.frames[1:].int() - clip.frames[:-1].int()).abs().float().mean((1, 2, 3))
        assert int(jumps.argmax()) + 1 == clip.shots[1].start
    assert {source[index].shots[1].start for index in range(20)} == {13, 29, 45}


def test_a_rendered_story_is_its_scenes_one_after_the_other() -> None:
    story = Story(STORIES[0].scenes, (1, 1, 2))
    frames = render_story(story, SIZES)
    parts = [render(story.scenes[0], 13), render(story.scenes[1], 16), render(story.scenes[2], 32)]
    assert torch.equal(frames, torch.cat(parts))


def test_training_sees_the_stories_cut_at_their_chunks(tmp_path: Path) -> None:
    """From the source through shards and the reader: pixels, prompts with the phrase, and no padding."""
    source = instantiate(compose("shards", ["source=toyworld_stories", "source.num_clips=3", "directory=x"]).source)
    write_shards(source, tmp_path, progress=False)
    spec = ClipSpec(num_frames=24, chunk_frames=4, height=64, width=64, fps=24)
    reader = IndexedShards([tmp_path], spec, seed=0, shuffle=True)
    for position in range(3):
        sample = reader[position]
        clip, story = source[sample.sample_id], random_story(0, sample.sample_id)
        prompt = StoryPrompt("x", tuple(shot.caption for shot in clip.shots), story.durations)
        assert (sample.prompts, sample.shot_index) == prompt.chunks("The scene transitions. ")
        assert sample.num_valid_frames == 24
        assert (sample.raw_frames.int() - clip.frames.int()).abs().float().mean() < 2, "but for the compression"


def test_prompts_are_stories_that_training_does_not_contain() -> None:
    config = compose("generate", ["prompt_set=toyworld_stories"])
    prompts = instantiate(config.prompts)
    assert len(prompts) == 32
    assert prompts == random_story_prompts(32, 1000003)
    assert len({prompt.name for prompt in prompts}) == 32
    assert all(parse_caption(caption).speed for prompt in prompts for caption in prompt.captions)
    assert {prompt.num_chunks for prompt in prompts} == {6}
    seen = {random_story(0, sample).prompt("x").captions for sample in range(200)}
    assert not seen & {prompt.captions for prompt in prompts}


def test_a_clip_is_a_function_of_the_seed_and_its_index() -> None:
    source, larger = ToyWorldStories(3), ToyWorldStories(50)
    for index in (2, 0):
        assert source[index].shots == larger[index].shots
        assert torch.equal(source[index].frames, larger[index].frames)
    assert ToyWorldStories(3, seed=1)[0].shots != source[0].shots
    assert len({source[index].key for index in range(3)}) == len(source) == 3


def test_impossible_stories_are_refused() -> None:
    for num_shots in (0, 7):
        with pytest.raises(ValueError, match=f"num_shots={num_shots} must be between 1 and num_chunks=6"):
            ToyWorldStories(1, num_shots=num_shots)
        with pytest.raises(ValueError, match=f"num_shots={num_shots} must be between 1"):
            random_story(0, 0, num_shots=num_shots)
    with pytest.raises(ValueError, match="num_clips=0"):
        ToyWorldStories(0)
    with pytest.raises(IndexError, match="clip 2 of a toy world of 2 stories"):
        ToyWorldStories(2)[2]
