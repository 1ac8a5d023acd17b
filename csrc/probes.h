// What this machine can do at best (probes.cpp); the binding is in module.cpp.
#pragma once

namespace w2s {

double copy_bandwidth(int megabytes, int threads, int repetitions);  // bytes read and written a second
double read_bandwidth(int megabytes, int threads, int repetitions);  // bytes read a second
double fma_peak(int threads, int repetitions);                       // FLOP/s in float32
const char* fma_isa();                                               // what `fma_peak` runs on

}  // namespace w2s
