"""Lists all mutants that `mutants.py` runs."""

from tests.mutant_lists.adapters import ADAPTERS
from tests.mutant_lists.commands import COMMANDS
from tests.mutant_lists.continuous import CONTINUOUS
from tests.mutant_lists.data import DATA
from tests.mutant_lists.decoding import DECODING
from tests.mutant_lists.evaluation import EVALUATION
from tests.mutant_lists.export import EXPORT
from tests.mutant_lists.importing import IMPORTING
from tests.mutant_lists.models import MODELS
from tests.mutant_lists.planning import PLANNING
from tests.mutant_lists.retrieval import RETRIEVAL
from tests.mutant_lists.serving import SERVING
from tests.mutant_lists.tokenizers import TOKENIZERS
from tests.mutant_lists.training import TRAINING
from tests.mutant_lists.watching import WATCHING

MUTANTS = (
  DATA
  + RETRIEVAL
  + TOKENIZERS
  + MODELS
  + TRAINING
  + ADAPTERS
  + DECODING
  + CONTINUOUS
  + EVALUATION
  + EXPORT
  + IMPORTING
  + PLANNING
  + WATCHING
  + SERVING
  + COMMANDS
)
