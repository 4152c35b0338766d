// The running statistics of many normalisations, moved by one launch.
#include "tile.cuh"

namespace p3d {

namespace {

constexpr int kThreads = 256;

struct RunningArgs {
    RunningNorm norms[kRunningNorms];
};
static_assert(sizeof(RunningArgs) <= 4096, "what a kernel takes as parameters");

// As torch.lerp rounds it.
__device__ __forceinline__ float moved(float from, float to, float weight) {
    return fabsf(weight) < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

// A block for each norm and each kThreads channels of the widest.
__global__ void __launch_bounds__(kThreads) running_stats_kernel(const __grid_constant__ RunningArgs args) {
    dependency_wait();
    const RunningNorm& norm = args.norms[blockIdx.x];
    int c = blockIdx.y * kThreads + threadIdx.x;
    if (c == 0 && norm.count) *norm.count += 1;
    if (c >= norm.channels) return;
    norm.mean[c] = moved(norm.mean[c], norm.batch_mean[c], norm.momentum);
    norm.var[c] = moved(norm.var[c], norm.batch_var[c], norm.momentum);
}

}  // namespace

const char* running_stats(const RunningNorm* norms, int count, CUstream_st* stream) {
    for (int begin = 0; begin < count; begin += kRunningNorms) {
        RunningArgs args{};
        int here = count - begin < kRunningNorms ? count - begin : kRunningNorms, widest = 1;
        for (int i = 0; i < here; ++i) {
            args.norms[i] = norms[begin + i];
            if (args.norms[i].channels > widest) widest = args.norms[i].channels;
        }
        dim3 grid(here, (widest + kThreads - 1) / kThreads);
        cudaError_t error = launch_dependent(running_stats_kernel, grid, kThreads, 0, stream, args);
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    return nullptr;
}

}  // namespace p3d
