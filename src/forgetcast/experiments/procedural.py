"""Built-in fine-tuning tasks: procedurally generated questions and answers from reasoning-gym, of many kinds."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

from forgetcast.data.pool import Example, Pool
from forgetcast.errors import MissingExtraError

NEW_TASKS = ("basic_arithmetic", "word_sequence_reversal", "family_relationships", "rotate_matrix")
"""Kept out of first atlases, to judge forecasts on: arithmetic, words, language, and tables of digits."""

KNOWN_TASKS = (
    "chain_sum",
    "spell_backward",
    "syllogism",
    "binary_matrix",
    "letter_counting",
    "time_intervals",
    "sentence_reordering",
    "base_conversion",
    "caesar_cipher",
    "leg_counting",
    "number_filtering",
    "simple_geometry",
    # From here only in the demo with 40 tasks.
    "fraction_simplification",
    "word_ladder",
    "calendar_arithmetic",
    "gcd",
    "aiw",
    "power_function",
    "bf",
    "number_format",
    "bitwise_arithmetic",
    "dice",
    "isomorphic_strings",
    "ransom_note",
    "survo",
    "cryptarithm",
    "word_sorting",
    "simple_equations",
    "mini_sudoku",
    "palindrome_generation",
    "color_cube_rotation",
    "coin_flip",
    "decimal_chain_sum",
    "prime_factorization",
    "complex_arithmetic",
    "number_sequence",
)
"""Tasks of a first atlas, in an order of which every prefix is diverse."""


def procedural_task(name: str, size: int, *, seed: int = 0) -> Pool:
    """Generate `size` questions with answers, reproducibly by seed.

    Parameters
    ----------
    name : str
        Of a data set of reasoning-gym, such as those in `KNOWN_TASKS`.
    size : int
    seed : int

    Raises
    ------
    MissingExtraError
        If reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingExtraError("demo", error) from error
    with redirect_stdout(io.StringIO()):  # some tasks print dots
        entries = list(reasoning_gym.create_dataset(name, size=size, seed=seed))
    return Pool(
        [
            Example(
                id=f"{name}-{i}", prompt=f"Question: {entry['question']}\nAnswer:", completion=f" {entry['answer']}"
            )
            for i, entry in enumerate(entries)
        ],
        where=f"the task {name}",
    )
