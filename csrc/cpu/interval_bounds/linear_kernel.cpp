// The table of interval_linear's kernels; see linear.cpp.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/interval_bounds/blocks_kernel.h"

W2S_KERNELS(LinearKernels, chain<Real>, panel_width<Real>, tile_height<Real>, center<Real>, forward_block<Real>,
            forward_alive<Real>, gradient_of<Real>, input_gradients<Real>, stream<Real>, input_panel<Real>,
            absolute<Real>, add_signed<Real>, finish<Real>, pack_gradient<Real>, weight_panel<Real>,
            gradient_strip<Real>)

#include "cpu/target_end.h"
