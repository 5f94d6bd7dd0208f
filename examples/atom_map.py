"""Which atom became which? One head of a model that was never told knows it (rxnmapper, Schwaller et al. 2021).

An ALBERT of 12 layers × 8 heads learnt to fill gaps in chemical reactions. In its eleventh layer the sixth head looks,
from each atom of the product, at the atom that it was before: the atom map of the reaction.
"""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AlbertModel, logging

import regard
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("atom_map.png"))
out = parser.parse_args().out

REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
TRUE = [1, 2, 4, 6, 24, 23, 22, 21, 20, 18, 17]  # where a chemist finds the product's atoms among the tokens before
TOKEN = r">>|\[[^]]+]|Br|Cl|[BCNOPSFIbcnops]|\d|[-=#().+/\\]"

logging.set_verbosity_error()
logging.disable_progress_bar()
package = find_spec("rxnmapper")
assert package is not None, 'pip install --no-deps "rxnmapper==0.4.3": of it only the weights are read'
folder = Path((package.submodule_search_locations or [""])[0], "models/transformers/albert_heads_8_uspto_all_1310k")
vocabulary = (folder / "vocab.txt").read_text().split("\n")
tokens = ["[CLS]", *re.findall(TOKEN, REACTION), "[SEP]"]
atoms = [n for n, token in enumerate(tokens[1:-1], 1) if re.search("[A-Za-z]", token)]
arrow = tokens.index(">>")
before, after = [n for n in atoms if n < arrow], [n for n in atoms if n > arrow]

model = AlbertModel.from_pretrained(folder).eval()
with torch.no_grad(), regard.record(model) as seen:
    model(torch.tensor([[vocabulary.index(token) for token in tokens]]))
weights = seen.maps[10].weights(heads=[5], rows=after, keys=before)[0, 0]
found = [before[n] for n in weights.argmax(-1)]
right = sum(a == b for a, b in zip(found, TRUE, strict=True))
print(f"atoms of the product that look at themselves before: {right} of {len(TRUE)}")

labels = {n: f"{tokens[n]}{n}" for n in atoms}
ax = heatmap(weights, [labels[n] for n in after], [labels[n] for n in before])
ax.set(title=REACTION.replace(">>", "\n>> "), xlabel="atoms before", ylabel="atoms of the product")
ax.title.set_fontsize("small")
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if right < len(TRUE):
    raise SystemExit("every atom was expected")
