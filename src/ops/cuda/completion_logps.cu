// The head's softmax pass over a chunk of rows: what is said of each target, and what the gradient is made of.
#include "common.cuh"

// Of each row: log-prob of the target, entropy, mean logit, whether nothing is above the target, and the log-prob and number
// of the most probable token, the first of equals. A block a row.
template <typename T>
__device__ void score_tokens(const float* logits, const unsigned* targets, float* scores, T* gradient, int vocabulary,
                             float cap) {
    const float* row = logits + (long long)blockIdx.x * vocabulary;
    float largest = -INFINITY_F, total = 0.0f;
    for (int token = threadIdx.x * LANES; token < vocabulary; token += blockDim.x * LANES) {
        int count = vocabulary - token;
        float z[LANES];
        load(z, row + token, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (i < count) {
                float logit = capped(z[i], cap);
                largest = fmaxf(largest, logit);
                total += logit;
            }
        }
    }
    largest = block_max(largest);
    total = block_sum(total);
    // sum e^(z - largest), and the same times (z - largest), which entropy needs
    float sum = 0.0f, along = 0.0f;
    // numbers of tokens are exact in f32; below zero, so that the largest is the first
    float first = -INFINITY_F;
    for (int token = threadIdx.x * LANES; token < vocabulary; token += blockDim.x * LANES) {
        int count = vocabulary - token;
        float z[LANES];
        load(z, row + token, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (i < count) {
                float below = capped(z[i], cap) - largest, e = expf(below);
                if (below >= 0.0f) first = fmaxf(first, -(float)(token + i));
                sum += e;
                // e^-inf is 0, and 0 times it is to be 0 too
                along += e > 0.0f ? below * e : 0.0f;
            }
        }
    }
    sum = block_sum(sum);
    along = block_sum(along);
    first = block_max(first);
    unsigned target = targets[blockIdx.x];
    if (threadIdx.x == 0) {
        float at_target = capped(row[target], cap);
        float* of_row = scores + 6ll * blockIdx.x;
        of_row[0] = at_target - largest - logf(sum);
        of_row[1] = logf(sum) - along / sum;
        of_row[2] = total / (float)vocabulary;
        of_row[3] = at_target >= largest ? 1.0f : 0.0f;
        of_row[4] = -logf(sum);
        of_row[5] = -first;
    }
    if (!gradient) return;
    // (onehot - softmax) (1 - (z / cap)^2)
    float share = 1.0f / sum;
    for (int token = threadIdx.x * LANES; token < vocabulary; token += blockDim.x * LANES) {
        int count = vocabulary - token;
        float z[LANES];
        load(z, row + token, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            float logit = capped(z[i], cap), bent = cap > 0.0f ? logit / cap : 0.0f;
            float hit = (unsigned)(token + i) == target ? 1.0f : 0.0f;
            z[i] = (hit - expf(logit - largest) * share) * (1.0f - bent * bent);
        }
        store(gradient + (long long)blockIdx.x * vocabulary + token, z, count);
    }
}

// Rows of `u` times a number each.
template <typename T>
__device__ void scale_rows(const T* u, const float* factors, T* out, int rows, int width) {
    int row = blockIdx.x;
    if (row >= rows) return;
    float factor = factors[row];
    long long start = (long long)row * width;
    for (int column = threadIdx.x * LANES; column < width; column += blockDim.x * LANES) {
        float values[LANES];
        load(values, u + start + column, width - column);
#pragma unroll
        for (int i = 0; i < LANES; i++) values[i] *= factor;
        store(out + start + column, values, width - column);
    }
}

#define HEAD(T, NAME)                                                                                                    \
    extern "C" __global__ void score_tokens_##NAME(const float* logits, const unsigned* targets, float* scores,          \
                                                   T* gradient, int vocabulary, float cap) {                             \
        score_tokens(logits, targets, scores, gradient, vocabulary, cap);                                                \
    }                                                                                                                    \
    extern "C" __global__ void scale_rows_##NAME(const T* u, const float* factors, T* out, int rows, int width) {        \
        scale_rows(u, factors, out, rows, width);                                                                        \
    }
HEAD(float, f32)
HEAD(bf16, bf16)
