// cosine_gate: formulas and shapes are in kernels/cosine_gate.py.
#include "common.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // floor of a product of two squared norms

// cos = p / sqrt(q s), and its derivatives
struct Cosine {
    float value, dp, dq, ds;

    Cosine(float p, float q, float s) {
        float product = std::max(q * s, SMALLEST);
        dp = 1.0f / std::sqrt(product);
        value = p * dp;
        float half = q * s > SMALLEST ? -0.5f * value / product : 0.0f;
        dq = half * s;
        ds = half * q;
    }
};

// From x . x, x . F, F . F: the cosines of (x, F) and of (x + gate F, x + F).
struct Angles {
    Cosine incompatible, consistent;

    Angles(const float* dots, float g)
        : incompatible(dots[1], dots[0], dots[2]),
          consistent(dots[0] + (1 + g) * dots[1] + g * dots[2], dots[0] + 2 * g * dots[1] + g * g * dots[2],
                     dots[0] + 2 * dots[1] + dots[2]) {}
};

template <bool PAST, class T>
void forward(i64 threads, i64 tokens, i64 C, const T* x, const T* branch, const float* gate, T* out, float* cir,
             float* distance, float* dots) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            vec xx = {}, xf = {}, ff = {};
            float g = gate[t], *d = dots + 3 * t;
            sweep(C, [&](i64 c, auto part) {
                vec v = load_ahead(x + t * C + c, part), f = load_ahead(branch + t * C + c, part);
                xx += v * v;
                xf += v * f;
                ff += f * f;
                store_maybe_past<PAST>(out + t * C + c, f * g, part);
            });
            d[0] = sum(xx);
            d[1] = sum(xf);
            d[2] = sum(ff);
            Angles angles(d, g);
            cir[t] = 1 - angles.incompatible.value;
            distance[t] = 2 - 2 * angles.consistent.value;
        }
    });
}

template <bool PAST, class T>
void backward(i64 threads, i64 tokens, i64 C, const T* gout, const float* gcir, const float* gdistance, const T* x,
              const T* branch, const float* gate, const float* dots, T* dx, T* dbranch, float* dgate) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            const float* d = dots + 3 * t;
            float g = gate[t], on_cos = -gcir[t], on_turn = -2 * gdistance[t];
            Angles angles(d, g);
            const Cosine &a = angles.incompatible, &b = angles.consistent;
            float xx = on_cos * a.dq + on_turn * (b.dp + b.dq + b.ds);
            float xf = on_cos * a.dp + on_turn * (b.dp * (1 + g) + b.dq * 2 * g + b.ds * 2);
            float ff = on_cos * a.ds + on_turn * (b.dp * g + b.dq * g * g + b.ds);
            float turn = on_turn * (b.dp * (d[1] + d[2]) + b.dq * 2 * (d[1] + g * d[2]));
            vec on_gate = {};
            sweep(C, [&](i64 c, auto part) {
                vec v = load_ahead(x + t * C + c, part), f = load_ahead(branch + t * C + c, part),
                    grad = load_ahead(gout + t * C + c, part);
                on_gate += grad * f;
                store_maybe_past<PAST>(dx + t * C + c, v * (2 * xx) + f * xf, part);
                store_maybe_past<PAST>(dbranch + t * C + c, grad * g + v * xf + f * (2 * ff), part);
            });
            dgate[t] = sum(on_gate) + turn;
        }
    });
}

}  // namespace

extern "C" {

void cosine_gate_forward(i64 dtype, i64 threads, i64 tokens, i64 C, const void* x, const void* branch,
                         const float* gate, void* out, float* cir, float* distance, float* dots) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)out, C, tokens) ? forward<true, T> : forward<false, T>;
        run(threads, tokens, C, (const T*)x, (const T*)branch, gate, (T*)out, cir, distance, dots);
    })
}

void cosine_gate_backward(i64 dtype, i64 threads, i64 tokens, i64 C, const void* gout, const float* gcir,
                          const float* gdistance, const void* x, const void* branch, const float* gate,
                          const float* dots, void* dx, void* dbranch, float* dgate) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dx, C, tokens) ? backward<true, T> : backward<false, T>;
        run(threads, tokens, C, (const T*)gout, gcir, gdistance, (const T*)x, (const T*)branch, gate, dots, (T*)dx,
            (T*)dbranch, dgate);
    })
}
}
