#include "cpu/linear_loss/chunks.h"
#include "cpu/linear_loss/gradient.h"

// What every loss of the family is made of, compiled here and not with each of them.
namespace w2s {
namespace linear {

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
