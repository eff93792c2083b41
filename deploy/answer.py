"""`python -m deploy.answer FRAME OUT`, run inside a bento: its answers to a frame of features, as it serves them."""

from pathlib import Path

import deploy.imports

SRC = Path(__file__).resolve().parents[1]
deploy.imports.install(SRC)

import sys  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from features.frame import as_array  # noqa: E402
from features.preprocess import Preprocess  # noqa: E402
from models.score import Model  # noqa: E402


def main(frame: Path, out: Path) -> None:
    """Writes one column `score` for the rows of `frame`."""
    bundle = SRC / "bundle"
    table = pq.read_table(frame)
    columns = {
        name: as_array(table[name], "string" if pa.types.is_string(table[name].type) else "float64")
        for name in table.column_names
    }
    scores = Model.load(bundle).predict(Preprocess.load(bundle / "preprocess.json").transform(columns))
    pq.write_table(pa.table({"score": scores}), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
