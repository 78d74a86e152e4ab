// AdamW over one flat buffer, and the sum of squares that clipping needs.
#include "common.cuh"

// p - rate decay p - size m' / (sqrt(v') / correction + epsilon), with m' and v' written in place. Elements before `split`
// have the first rate and size, the others (LoRA+) the second.
extern "C" __global__ void adamw(const float* p, const float* g, float* m, float* v, float* out, long long count,
                                 long long split, float decay_a, float decay_b, float size_a, float size_b, float beta1,
                                 float beta2, float rest1, float rest2, float correction, float epsilon) {
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    if (at >= count) return;
    int left = count - at < LANES ? (int)(count - at) : LANES;
    float parameter[LANES], gradient[LANES], first[LANES], second[LANES];
    load(parameter, p + at, left);
    load(gradient, g + at, left);
    load(first, m + at, left);
    load(second, v + at, left);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        bool is_a = at + i < split;
        first[i] = first[i] * beta1 + gradient[i] * rest1;
        second[i] = second[i] * beta2 + gradient[i] * gradient[i] * rest2;
        float denominator = sqrtf(second[i]) / correction + epsilon;
        parameter[i] = parameter[i] * (is_a ? decay_a : decay_b) - first[i] / denominator * (is_a ? size_a : size_b);
    }
    store(out + at, parameter, left);
    store(m + at, first, left);
    store(v + at, second, left);
}

// A partial sum a block, in f64.
extern "C" __global__ void square_sums(const float* x, double* sums, long long count) {
    double sum = 0.0;
    for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * LANES; at < count;
         at += (long long)gridDim.x * blockDim.x * LANES) {
        float values[LANES];
        load(values, x + at, count - at < LANES ? (int)(count - at) : LANES);
#pragma unroll
        for (int i = 0; i < LANES; i++) sum += (double)values[i] * (double)values[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
