#include "cpu/linear_loss/chunks.h"
#include "cpu/linear_loss/gradient.h"

// What every loss of the family is made of, compiled here and not with each of them.
namespace w2s {
namespace linear {

void LinearArguments::fit() const {
  const size_t n = hiddens.size();
  check(n > 0 && heads.size() == n && (biases.empty() || biases.size() == n), "hiddens, heads and biases must be as many");
  for (size_t i = 0; i < n; ++i) {
    check(hiddens[i].dim() == 2 && hiddens[i].size(0) == rows(), "hiddens must be [T, D], of the same T");
    check(heads[i].dim() == 2 && heads[i].size(0) >= vocab_size && heads[i].size(1) == hiddens[i].size(1),
          "heads must be [at least vocab_size, D], of their hidden states' D");
    check(biases.empty() || (biases[i].dim() == 1 && biases[i].size(0) >= vocab_size), "biases must have an entry for each token");
  }
  if (weights) expect(*weights, "weights", {rows(), int64_t(n)});
}

template struct Engine<float>;
template struct Engine<double>;
template struct Statistics<float>;
template struct Statistics<double>;
template struct SoftTarget<float>;
template struct SoftTarget<double>;
template struct Agreement<float>;
template struct Agreement<double>;
template struct Gradients<float>;
template struct Gradients<double>;
template struct Head<float>;
template struct Head<double>;
template struct Spend<float>;
template struct Spend<double>;

}  // namespace linear
}  // namespace w2s
