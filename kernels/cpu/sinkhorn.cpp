// sinkhorn: formulas and shapes are in kernels/sinkhorn.py. A vector holds one matrix entry of 16 tokens.
#include "common.h"

namespace {

constexpr float SMALLEST = 1e-30f;

INLINE vec maximum(vec a, vec b) { return a > b ? a : b; }

INLINE void gather(const float* from, i64 count, i64 entries, float* to) {
    for (i64 e = 0; e < entries; e++)
        for (i64 k = 0; k < WIDTH; k++) to[e * WIDTH + k] = k < count ? from[k * entries + e] : 0.0f;
}

INLINE void scatter(const float* from, i64 count, i64 entries, float* to) {
    for (i64 k = 0; k < count; k++)
        for (i64 e = 0; e < entries; e++) to[k * entries + e] = from[e * WIDTH + k];
}

// Divides each line of the n x n matrix m by its sum, kept in `sums` (n): entry k of line q is m[q * line + k * next].
INLINE void normalise(i64 n, i64 line, i64 next, float* m, float* sums) {
    for (i64 q = 0; q < n; q++) {
        float* at = m + q * line * WIDTH;
        vec total = {};
        for (i64 k = 0; k < n; k++) total += load(at + k * next * WIDTH);
        vec inverse = 1.0f / total;
        for (i64 k = 0; k < n; k++) store(at + k * next * WIDTH, load(at + k * next * WIDTH) * inverse);
        store(sums + q * WIDTH, total);
    }
}

// Its gradient in place, from the normalised matrix m and the sums: g = (g - sum of g m over the line) / sum.
INLINE void normalise_gradient(i64 n, i64 line, i64 next, const float* m, const float* sums, float* g) {
    for (i64 q = 0; q < n; q++) {
        i64 at = q * line * WIDTH;
        vec along = {}, inverse = 1.0f / load(sums + q * WIDTH);
        for (i64 k = 0; k < n; k++) along += load(g + at + k * next * WIDTH) * load(m + at + k * next * WIDTH);
        for (i64 k = 0; k < n; k++) {
            i64 e = at + k * next * WIDTH;
            store(g + e, (load(g + e) - along) * inverse);
        }
    }
}

// exp(logits), each column less its largest: the first column step divides that away.
INLINE void exponentials(i64 n, float* m) {
    for (i64 col = 0; col < n; col++) {
        vec top = load(m + col * WIDTH);
        for (i64 row = 1; row < n; row++) top = maximum(top, load(m + (row * n + col) * WIDTH));
        for (i64 row = 0; row < n; row++) {
            float* e = m + (row * n + col) * WIDTH;
            store(e, exp(load(e) - top));
        }
    }
}

INLINE void add_smallest(i64 entries, float* m) {
    for (i64 e = 0; e < entries; e++) store(m + e * WIDTH, load(m + e * WIDTH) + SMALLEST);
}

}  // namespace

extern "C" {

void sinkhorn_forward(i64, i64 threads, i64 tokens, i64 n, i64 iterations, const float* logits, float* out) {
    i64 entries = n * n, blocks = (tokens + WIDTH - 1) / WIDTH;
    parallel(blocks, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        floats m(entries * WIDTH), sums(n * WIDTH);
        for (i64 t = first * WIDTH; t < std::min(last * WIDTH, tokens); t += WIDTH) {
            i64 count = std::min(WIDTH, tokens - t);
            gather(logits + t * entries, count, entries, m.data());
            exponentials(n, m.data());
            for (i64 step = 0; step < iterations; step++) {
                normalise(n, 1, n, m.data(), sums.data());
                if (!step) add_smallest(entries, m.data());
                normalise(n, n, 1, m.data(), sums.data());
            }
            scatter(m.data(), count, entries, out + t * entries);
        }
    });
}

void sinkhorn_backward(i64, i64 threads, i64 tokens, i64 n, i64 iterations, const float* g, const float* logits,
                       float* dlogits) {
    i64 entries = n * n, blocks = (tokens + WIDTH - 1) / WIDTH, steps = 2 * iterations;
    parallel(blocks, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        floats history(steps * entries * WIDTH), sums(steps * n * WIDTH), grad(entries * WIDTH);
        for (i64 t = first * WIDTH; t < std::min(last * WIDTH, tokens); t += WIDTH) {
            i64 count = std::min(WIDTH, tokens - t), size = entries * WIDTH;
            float* m = history.data();
            gather(logits + t * entries, count, entries, m);
            exponentials(n, m);
            for (i64 step = 0; step < steps; step++) {
                if (step) std::copy_n(m + (step - 1) * size, size, m + step * size);
                if (step == 1) add_smallest(entries, m + size);
                if (step % 2)
                    normalise(n, n, 1, m + step * size, &sums[step * n * WIDTH]);
                else
                    normalise(n, 1, n, m + step * size, &sums[step * n * WIDTH]);
            }
            gather(g + t * entries, count, entries, grad.data());
            for (i64 step = steps - 1; step > 0; step--)
                if (step % 2)
                    normalise_gradient(n, n, 1, m + step * size, &sums[step * n * WIDTH], grad.data());
                else
                    normalise_gradient(n, 1, n, m + step * size, &sums[step * n * WIDTH], grad.data());
            // The first column step and exp are one softmax: g = m (g - sum of g m over the column).
            for (i64 col = 0; col < n; col++) {
                vec along = {};
                for (i64 row = 0; row < n; row++)
                    along += load(&grad[(row * n + col) * WIDTH]) * load(m + (row * n + col) * WIDTH);
                for (i64 row = 0; row < n; row++) {
                    i64 e = (row * n + col) * WIDTH;
                    store(&grad[e], load(m + e) * (load(&grad[e]) - along));
                }
            }
            scatter(grad.data(), count, entries, dlogits + t * entries);
        }
    });
}
}
