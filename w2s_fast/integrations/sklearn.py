"""scikit-learn: nearest-mean classification as an estimator."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import extra
from ..ops.prototypes.class_stats import ClassStats, class_stats
from ..ops.prototypes.prototype_distance import prototype_distance

with extra("sklearn"):
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets, unique_labels
    from sklearn.utils.validation import check_is_fitted, validate_data

__all__ = ["NearestPrototype"]


def _tensor(x: Any) -> torch.Tensor:
    """Rows in memory that torch takes; copied where they are not."""
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


class NearestPrototype(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classification by the nearest class mean (nearest mean on frozen features, arXiv 2210.04428), for streams too.

    `partial_fit` in any order of batches gives the means of all rows. A class that was named and not seen yet is left
    out: it is never predicted and its probability is 0.

    Args:
        metric: ``"sqeuclidean"`` or ``"cosine"``, see `w2s_fast.prototype_distance`.
        temperature: of the softmax of `predict_proba`.
        normalize: whether rows are brought to unit norm before they are summed.

    Raises:
        ValueError: what scikit-learn says of wrong inputs.

    Example:
        >>> import numpy as np
        >>> from w2s_fast.integrations.sklearn import NearestPrototype
        >>> x = np.array([[0.0, 0.0], [1.0, 0.0], [4.0, 4.0]])
        >>> NearestPrototype().fit(x, ["low", "low", "high"]).predict([[3.0, 3.0]]).tolist()
        ['high']
    """

    def __init__(self, metric: str = "sqeuclidean", temperature: float = 1.0, normalize: bool = False) -> None:
        self.metric, self.temperature, self.normalize = metric, temperature, normalize

    def fit(self, X: Any, y: Any) -> NearestPrototype:
        """The means of X ``[N, D]`` by class y ``[N]``, forgetting all rows before."""
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        return self._start(X, unique_labels(y))._add(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> NearestPrototype:
        """Add rows; ``classes`` names all classes there will be, at the first call.

        Raises:
            ValueError: classes missing at the first call or others at a later one, or y with one that was not named.
        """
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], reset=first)
        check_classification_targets(y)
        if first:
            self._start(X, unique_labels(classes))
        elif classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, got {classes}.")
        return self._add(X, y)

    def _start(self, X: Any, classes: Any) -> NearestPrototype:
        self.classes_ = classes
        self.sums_ = np.zeros((len(classes), X.shape[1]))
        self.counts_ = np.zeros(len(classes), dtype=np.int64)
        return self

    def _add(self, X: Any, y: Any) -> NearestPrototype:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y must hold classes of the first call only, got {unknown}.")
        labels = torch.from_numpy(np.searchsorted(self.classes_, y))
        added = class_stats(
            _tensor(X), labels, len(self.classes_), normalize=self.normalize,
            onto=self._stats(),
        )  # fmt: skip
        self.sums_, self.counts_ = added.sums.numpy(), added.counts.numpy()
        return self

    def _stats(self) -> ClassStats:
        return ClassStats(torch.from_numpy(self.sums_), torch.from_numpy(self.counts_))

    def _nearest(self, X: Any, every: bool) -> Any:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        rows = _tensor(X)
        means, valid = self._stats().means().to(rows.dtype), self._stats().valid()
        if not every:
            metric: Any = self.metric
            return prototype_distance(rows, means, valid=valid, metric=metric, return_distance=False).indices
        if self.metric == "cosine":
            unit = torch.nn.functional.normalize
            scores = unit(rows, dim=1) @ unit(means, dim=1).t()
        else:
            scores = 2 * rows @ means.t() - means.square().sum(1)
        return (scores / self.temperature).masked_fill(~valid, -torch.inf)

    def predict(self, X: Any) -> Any:
        """The class of the nearest mean of every row, ``[N]``."""
        nearest = self._nearest(X, every=False)[:, 0].numpy()
        return self.classes_[nearest]

    def predict_proba(self, X: Any) -> Any:
        """The softmax of minus the distances over the temperature, ``[N, K]``, 0 for a class that was not seen."""
        return self._nearest(X, every=True).softmax(1).numpy()
