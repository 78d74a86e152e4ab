// The softmax between attention's two products, over all segments and heads of a packed batch at once.
//
// Scores of a group of segments are one matrix of all its queries by all its keys; a row knows which of them it sees.
#include "common.cuh"

// A query's row of scores.
struct Row {
    // Where it begins in a head's plane, in elements; a multiple of 8.
    long long offset;
    // Elements up to the next row: the group's keys, and then some to a multiple of 8.
    int stride;
    // The keys it sees, counted from the group's first: some of the prefix, and some of its own.
    int prefix_start, prefix_end, own_start, own_end;
    // Its number among the queries.
    int query;

    __device__ __forceinline__ bool sees(int key) const {
        return (key >= prefix_start && key < prefix_end) || (key >= own_start && key < own_end);
    }
};

// Weights of `gridDim.y` heads from `first_head` on, and the log-sum-exp of each row. What is not seen, and the padding, is 0.
template <typename T>
__device__ void softmax_forward(const float* scores, T* weights, float* log_sum_exp, const Row* rows, long long plane,
                                int heads, int first_head, float cap) {
    Row row = rows[blockIdx.x];
    long long start = (long long)blockIdx.y * plane + row.offset;
    float largest = -INFINITY_F;
    for (int key = threadIdx.x * LANES; key < row.stride; key += blockDim.x * LANES) {
        float values[LANES];
        load(values, scores + start + key, row.stride - key);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (row.sees(key + i)) largest = fmaxf(largest, capped(values[i], cap));
        }
    }
    largest = block_max(largest);
    float sum = 0.0f;
    for (int key = threadIdx.x * LANES; key < row.stride; key += blockDim.x * LANES) {
        float values[LANES];
        load(values, scores + start + key, row.stride - key);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (row.sees(key + i)) sum += expf(capped(values[i], cap) - largest);
        }
    }
    sum = block_sum(sum);
    float lse = largest + logf(sum);
    if (threadIdx.x == 0) log_sum_exp[(long long)row.query * heads + first_head + blockIdx.y] = lse;
    for (int key = threadIdx.x * LANES; key < row.stride; key += blockDim.x * LANES) {
        float values[LANES];
        load(values, scores + start + key, row.stride - key);
#pragma unroll
        for (int i = 0; i < LANES; i++) values[i] = row.sees(key + i) ? expf(capped(values[i], cap) - lse) : 0.0f;
        store(weights + start + key, values, row.stride - key);
    }
}

// The weights again, and the gradient of what was multiplied by `scale`: dS = P (dP - delta) (1 - (S / cap)^2) scale.
template <typename T>
__device__ void softmax_backward(const float* scores, const float* d_weights, const float* log_sum_exp, const float* delta,
                                 T* weights, T* d_scores, const Row* rows, long long plane, int heads, int first_head,
                                 float cap, float scale) {
    Row row = rows[blockIdx.x];
    long long start = (long long)blockIdx.y * plane + row.offset;
    long long number = (long long)row.query * heads + first_head + blockIdx.y;
    float lse = log_sum_exp[number], mean = delta[number];
    for (int key = threadIdx.x * LANES; key < row.stride; key += blockDim.x * LANES) {
        int count = row.stride - key;
        float values[LANES], gradients[LANES];
        load(values, scores + start + key, count);
        load(gradients, d_weights + start + key, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            bool seen = row.sees(key + i);
            float score = capped(values[i], cap), bent = cap > 0.0f ? score / cap : 0.0f;
            float weight = seen ? expf(score - lse) : 0.0f;
            values[i] = weight;
            gradients[i] = seen ? weight * (gradients[i] - mean) * (1.0f - bent * bent) * scale : 0.0f;
        }
        store(weights + start + key, values, count);
        store(d_scores + start + key, gradients, count);
    }
}

// delta = rowsum(dO O) of each head. A warp a head; `dimension` columns each.
template <typename T>
__device__ void row_dots(const T* a, const T* b, float* dots, long long count, int dimension) {
    long long item = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (item >= count) return;
    float sum = 0.0f;
    for (int column = threadIdx.x * LANES; column < dimension; column += WARP * LANES) {
        float x[LANES], y[LANES];
        load(x, a + item * dimension + column, dimension - column);
        load(y, b + item * dimension + column, dimension - column);
#pragma unroll
        for (int i = 0; i < LANES; i++) sum += x[i] * y[i];
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) dots[item] = sum;
}

#define ATTENTION(T, NAME)                                                                                               \
    extern "C" __global__ void softmax_forward_##NAME(const float* scores, T* weights, float* log_sum_exp,               \
                                                      const Row* rows, long long plane, int heads, int first_head,       \
                                                      float cap) {                                                       \
        softmax_forward(scores, weights, log_sum_exp, rows, plane, heads, first_head, cap);                              \
    }                                                                                                                    \
    extern "C" __global__ void softmax_backward_##NAME(const float* scores, const float* d_weights,                      \
                                                       const float* log_sum_exp, const float* delta, T* weights,         \
                                                       T* d_scores, const Row* rows, long long plane, int heads,         \
                                                       int first_head, float cap, float scale) {                         \
        softmax_backward(scores, d_weights, log_sum_exp, delta, weights, d_scores, rows, plane, heads, first_head, cap,  \
                         scale);                                                                                         \
    }                                                                                                                    \
    extern "C" __global__ void row_dots_##NAME(const T* a, const T* b, float* dots, long long count, int dimension) {    \
        row_dots(a, b, dots, count, dimension);                                                                          \
    }
ATTENTION(float, f32)
ATTENTION(bf16, bf16)
