"""train.py from any working directory, with data that is not prepared yet, and with a model that was edited since."""

import json

import pytest
from edited import SMALL, edited_copy, execute, train

from core.config import configure
from core.dataset import Dataset


def test_config_and_data_from_another_folder(tmp_path):
    """As its user starts it: names of the repository's config/ and data/ are found, data is prepared, and out_dir is
    here."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    scripts = edited_copy(tmp_path / "scripts")
    line = (scripts / "train.py", "config/train_toy.py", "--dataset=toy", "--max_iters=2", "--device=cpu",
            "--dtype=float32")
    first, second = (execute(scripts, *line, cwd=tmp_path / "elsewhere") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "toy is not prepared: python data/toy/prepare.py" in first.stdout and "is not prepared" not in second.stdout
    settings = json.loads((tmp_path / "elsewhere" / "out-toy" / "config.json").read_text())["settings"]
    assert settings["n_embd"] == 16 and (scripts / "data" / "toy" / "train.bin").exists()
    done = execute(scripts, *line[:1], "--dataset=data/toy", "--out_dir=other", *SMALL, "--block_size=8",
                   cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr


def test_names_here_come_first(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train_toy.py").write_text("n_embd = 3")
    assert configure({"n_embd": 1}, ["config/train_toy.py"])[0]["n_embd"] == 3
    (tmp_path / "toy").symlink_to(text)
    assert Dataset("toy").folder.resolve() == text.resolve()


@pytest.mark.parametrize("ranks", [1, 2])
def test_embedded_data_is_prepared(tmp_path, ranks):
    """By one rank of each machine."""
    said = train(edited_copy(tmp_path), tmp_path / "out", "sentences", "--max_iters=1", ranks=ranks)
    assert said.count("sentences is not prepared: python data/sentences/prepare.py") == 1


def test_data_that_needs_a_network_is_not_prepared(tmp_path):
    done = execute(edited_copy(tmp_path), "train.py", "--dataset=enwik8", *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and "enwik8 is not prepared; make it: python data/enwik8/prepare.py" in done.stderr


EDITED = [
    ([("self.up = ", "self.rise = "), ("self.activation(self.up(", "self.activation(self.rise(")],
     "only the file has layers.0.up.weight, layers.1.up.weight; only the model has layers.0.rise.weight, "
     "layers.1.rise.weight"),
    ([("self.up = nn.Linear(C, 4 * C,", "self.up = nn.Linear(C, 2 * C,"),
      ("self.down = nn.Linear(4 * C, C,", "self.down = nn.Linear(2 * C, C,")],
     "the weight layers.0.up.weight in out/"),
]


@pytest.mark.parametrize("changes, said", EDITED, ids=["renamed", "narrower"])
def test_a_model_that_was_edited_is_not_called_damaged(changes, said, text, tmp_path):
    train(edited_copy(tmp_path), "out", text, "--max_iters=1")
    edited_copy(tmp_path, *changes, name="model.py")
    for line in (("sample.py", "--out_dir=out", "--device=cpu"),
                 ("train.py", "--out_dir=out", f"--dataset={text}", *SMALL, "--init_from=resume")):
        done = execute(tmp_path, *line, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert "the model was edited after this training" in done.stderr and "damaged" not in done.stderr
    train(edited_copy(tmp_path), "out", text, "--max_iters=2", "--init_from=resume")
