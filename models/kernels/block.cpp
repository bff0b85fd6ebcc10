// What a block does around its mixer, forward and backward: projections, norms, the MLP and both residual sums.
//
// Rows, one a slot, go through in blocks of BLOCK: what is between the products stays in a core's cache and is never
// written, and the backward pass computes again all but what goes into the norm and into the MLP's activation.
// Weights are laid into panels first (see Panels), so that a product reads them in the order in which they lie.
// The gradients of weights are summed in as many parts as the shape alone says, and with it all rounding.
#include <cmath>

#include "jobs.h"
#include "product.h"

namespace {

constexpr int64_t BLOCK = 96;  // rows
constexpr double SLOPE = 1.702, LOG2E = 1.4426950408889634074;

// A matrix b (depth, width) as runs of PANEL columns, each (depth, PANEL), the last filled up with zeros.
template <typename T> struct Panels {
    using P = Product<T>;
    const int64_t depth, width;
    std::vector<T> data;

    // b[k][n] = from[k·k_step + n·n_step]
    Panels(const T* from, int64_t depth, int64_t width, int64_t k_step, int64_t n_step, int threads)
        : depth(depth), width(width), data((width + P::PANEL - 1) / P::PANEL * P::PANEL * depth) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t first = 0; first < width; first += P::PANEL) {
            int64_t columns = std::min<int64_t>(P::PANEL, width - first);
            T* to = data.data() + first * depth;
            for (int64_t k = 0; k < depth; k++)
                for (int64_t n = 0; n < columns; n++) to[k * P::PANEL + n] = from[k * k_step + (first + n) * n_step];
        }
    }

    // c = a b for `count` rows, or with ADD c += a b
    template <bool ADD> void times(int64_t count, const T* a, int64_t a_pitch, T* c, int64_t c_pitch) const {
        for (int64_t first = 0; first < width; first += P::PANEL)
            P::template any<ADD>(count, std::min<int64_t>(P::PANEL, width - first), depth, a, a_pitch, 1,
                                 data.data() + first * depth, P::PANEL, c + first, c_pitch);
    }
};

template <typename T> struct Norm {
    using P = Product<T>;
    using S = typename P::S;
    using V = typename P::V;
    static constexpr int LANES = P::LANES;
    const T* gain;
    const int64_t dim;
    const T eps;

    // Calls part(first, count) for every vector of a row.
    template <typename Part> INLINE void each(const Part& part) const {
        for (int64_t d = 0; d < dim; d += LANES) part(d, int(std::min<int64_t>(LANES, dim - d)));
    }

    // 1 / √(mean of squares + eps)
    T scale(const T* x) const {
        V squares{};
        each([&](int64_t d, int n) { V a = S::load(x + d, n); squares += a * a; });
        return 1 / std::sqrt(S::sum(squares) / T(dim) + eps);
    }

    void forward(const T* x, int64_t count, T* to, int64_t pitch) const {
        for (; count; count--, x += dim, to += pitch) {
            T factor = scale(x);
            each([&](int64_t d, int n) { S::store(to + d, S::load(x + d, n) * factor * S::load(gain + d, n), n); });
        }
    }

    // dx of each row, plus `residual` where there is one; dgain += what these rows add to it.
    void backward(const T* x, const T* grad, int64_t pitch, const T* residual, int64_t count, T* dx, T* dgain) const {
        for (; count; count--, x += dim, grad += pitch, dx += dim, residual += residual ? dim : 0) {
            T factor = scale(x);
            V along{};
            each([&](int64_t d, int n) {
                V part = S::load(grad + d, n) * S::load(x + d, n) * factor;
                S::store(dgain + d, S::load(dgain + d, n) + part, n);
                along += part * S::load(gain + d, n);
            });
            T mean = S::sum(along) / T(dim) * factor;
            each([&](int64_t d, int n) {
                V slope = (S::load(grad + d, n) * S::load(gain + d, n) - S::load(x + d, n) * mean) * factor;
                S::store(dx + d, residual ? S::load(residual + d, n) + slope : slope, n);
            });
        }
    }
};

template <typename T> struct Gelu {
    using P = Product<T>;
    using S = typename P::S;
    using V = typename P::V;
    static constexpr int LANES = P::LANES;

    static INLINE V sigmoid(V u) {
        V e = u * T(-SLOPE * LOG2E), most = S::fill(T(std::numeric_limits<T>::max_exponent - 2));
        return T(1) / (S::exp2(e < most ? e : most) + T(1));
    }

    // h = u·σ(1.702u)
    static void forward(const T* u, int64_t count, T* h) {
        for (int64_t i = 0; i < count; i += LANES) {
            int n = int(std::min<int64_t>(LANES, count - i));
            V x = S::load(u + i, n);
            S::store(h + i, x * sigmoid(x), n);
        }
    }

    // h as above, and grad times its derivative
    static void backward(const T* u, int64_t count, T* h, T* grad) {
        for (int64_t i = 0; i < count; i += LANES) {
            int n = int(std::min<int64_t>(LANES, count - i));
            V x = S::load(u + i, n), share = sigmoid(x), out = x * share;
            S::store(h + i, out, n);
            S::store(grad + i, S::load(grad + i, n) * (share + T(SLOPE) * (out - out * share)), n);
        }
    }
};

// to (width of a, width of b) += aᵀ b over `count` rows
template <typename T>
void outer(int64_t count, const T* a, int64_t a_width, int64_t a_pitch, const T* b, int64_t b_width, int64_t b_pitch, T* to) {
    Product<T>::template any<true>(a_width, b_width, count, a, 1, a_pitch, b, b_pitch, to, b_width);
}

// From one row to the next where a thread keeps its own: whole vectors, and not a power of two, which would crowd the
// cache.
template <typename T> int64_t pitch(int64_t width) {
    constexpr int64_t lanes = Product<T>::LANES;
    return (width + lanes - 1) / lanes * lanes + lanes;
}

template <typename T> void copy(const T* from, int64_t width, int64_t count, T* to, int64_t to_pitch) {
    for (int64_t row = 0; row < count; row++) std::copy_n(from + row * width, width, to + row * to_pitch);
}

// Calls work(part, first row, rows, room) for every block of rows of every part, in order within a part; `room` is
// `size` numbers of the thread's own.
template <typename T, typename Work>
void run(int64_t rows, int64_t parts, int64_t size, int threads, const Work& work) {
    int64_t each = (rows + parts - 1) / parts;
    auto blocks = [&](std::vector<T>& room, int64_t part) {
        int64_t end = std::min(rows, (part + 1) * each);
        for (int64_t row = part * each; row < end; row += BLOCK) work(part, row, std::min(BLOCK, end - row), room.data());
    };
    share<std::vector<T>>(threads, parts, blocks, size);
}

// The sums of all parts, one tensor after the other, to those tensors.
template <typename T, size_t N>
void sum_up(const T* sums, int64_t parts, int64_t size, T* const (&to)[N], const int64_t (&sizes)[N]) {
    for (size_t n = 0; n < N; sums += sizes[n], n++) {
        std::copy_n(sums, sizes[n], to[n]);
        for (int64_t part = 1; part < parts; part++)
            for (int64_t i = 0; i < sizes[n]; i++) to[n][i] += sums[part * size + i];
    }
}

struct Problem {
    int64_t rows, dim, width, parts;  // width: of what `project` gives, or of the MLP inside
    double eps;
    int threads;
    int64_t blocks() const { return std::max<int64_t>(1, (rows + BLOCK - 1) / BLOCK); }
};

// at: x, gain, weight, out
template <typename T> void project_forward(const Problem& p, T** at) {
    const T *x = at[0], *weight = at[2];
    const int64_t dim = p.dim, width = p.width, narrow = pitch<T>(dim);
    T* out = at[3];
    Norm<T> norm{at[1], dim, T(p.eps)};
    Panels<T> turned(weight, dim, width, 1, dim, p.threads);
    run<T>(p.rows, p.blocks(), BLOCK * narrow, p.threads, [&](int64_t, int64_t row, int64_t count, T* n) {
        norm.forward(x + row * dim, count, n, narrow);
        turned.template times<false>(count, n, narrow, out + row * width, width);
    });
}

// at: grad, x, gain, weight, dx, dgain, dweight, sums
template <typename T> void project_backward(const Problem& p, T** at) {
    const T *grad = at[0], *x = at[1], *weight = at[3];
    const int64_t dim = p.dim, width = p.width, narrow = pitch<T>(dim), size = (width + 1) * dim;
    T *dx = at[4], *sums = at[7];
    Norm<T> norm{at[2], dim, T(p.eps)};
    Panels<T> straight(weight, width, dim, dim, 1, p.threads);
    std::fill_n(sums, p.parts * size, T(0));
    run<T>(p.rows, p.parts, 2 * BLOCK * narrow, p.threads, [&](int64_t part, int64_t row, int64_t count, T* n) {
        T *dn = n + BLOCK * narrow, *dgain = sums + part * size, *dweight = dgain + dim;
        const T *g = grad + row * width, *rows = x + row * dim;
        norm.forward(rows, count, n, narrow);
        outer(count, g, width, width, n, dim, narrow, dweight);
        straight.template times<false>(count, g, width, dn, narrow);
        norm.backward(rows, dn, narrow, nullptr, count, dx + row * dim, dgain);
    });
    sum_up(sums, p.parts, size, {at[5], at[6]}, {dim, width * dim});
}

// at: x, mixed, outer weight, gain, up, down, out, y, u
template <typename T> void finish_forward(const Problem& p, T** at) {
    const T *x = at[0], *mixed = at[1];
    const int64_t dim = p.dim, wide = p.width, narrow = pitch<T>(dim), broad = pitch<T>(wide);
    Norm<T> norm{at[3], dim, T(p.eps)};
    Panels<T> last(at[2], dim, dim, 1, dim, p.threads), up(at[4], dim, wide, 1, dim, p.threads),
        down(at[5], wide, dim, 1, wide, p.threads);
    run<T>(p.rows, p.blocks(), BLOCK * (narrow + broad), p.threads, [&](int64_t, int64_t row, int64_t count, T* n) {
        T *h = n + BLOCK * narrow, *out = at[6] + row * dim, *y = at[7] + row * dim, *u = at[8] + row * wide;
        copy(x + row * dim, dim, count, y, dim);
        last.template times<true>(count, mixed + row * dim, dim, y, dim);
        norm.forward(y, count, n, narrow);
        up.template times<false>(count, n, narrow, u, wide);
        for (int64_t i = 0; i < count; i++) Gelu<T>::forward(u + i * wide, wide, h + i * broad);
        copy(y, dim, count, out, dim);
        down.template times<true>(count, h, broad, out, dim);
    });
}

// at: grad, mixed, outer weight, gain, up, down, y, u, dx, dmixed, dlast, dgain, dup, ddown, sums
template <typename T> void finish_backward(const Problem& p, T** at) {
    const int64_t dim = p.dim, wide = p.width, narrow = pitch<T>(dim), broad = pitch<T>(wide);
    const int64_t size = dim * (2 * wide + dim + 1);
    Norm<T> norm{at[3], dim, T(p.eps)};
    Panels<T> last(at[2], dim, dim, dim, 1, p.threads), up(at[4], wide, dim, dim, 1, p.threads),
        down(at[5], dim, wide, wide, 1, p.threads);
    std::fill_n(at[14], p.parts * size, T(0));
    run<T>(p.rows, p.parts, BLOCK * (3 * narrow + 2 * broad), p.threads, [&](int64_t part, int64_t row, int64_t count, T* n) {
        T *dn = n + BLOCK * narrow, *m = dn + BLOCK * narrow, *h = m + BLOCK * narrow, *du = h + BLOCK * broad;
        T *dlast = at[14] + part * size, *dgain = dlast + dim * dim, *dup = dgain + dim, *ddown = dup + wide * dim;
        const T *g = at[0] + row * dim, *mixed = at[1] + row * dim, *y = at[6] + row * dim, *u = at[7] + row * wide;
        T *dx = at[8] + row * dim, *dmixed = at[9] + row * dim;
        down.template times<false>(count, g, dim, du, broad);
        for (int64_t i = 0; i < count; i++) Gelu<T>::backward(u + i * wide, wide, h + i * broad, du + i * broad);
        outer(count, g, dim, dim, h, wide, broad, ddown);
        norm.forward(y, count, n, narrow);
        outer(count, du, wide, broad, n, dim, narrow, dup);
        up.template times<false>(count, du, broad, dn, narrow);
        norm.backward(y, dn, narrow, g, count, dx, dgain);
        last.template times<false>(count, dx, dim, dmixed, dim);
        copy(mixed, dim, count, m, narrow);
        outer(count, dx, dim, dim, m, dim, narrow, dlast);
    });
    sum_up(at[14], p.parts, size, {at[10], at[11], at[12], at[13]}, {dim * dim, dim, wide * dim, dim * wide});
}

}  // namespace

// shape: rows, dim, width, parts of the rows; then the norm's eps; whole tensors.
#define EXPORT(name, T, type)                                                                                    \
    extern "C" int block_##name##_##type(const int64_t* s, double eps, int threads, void** at, const int64_t*) { \
        return guarded([&] { name<T>({s[0], s[1], s[2], s[3], eps, threads}, reinterpret_cast<T**>(at)); });     \
    }
EXPORT(project_forward, float, float32)
EXPORT(project_forward, double, float64)
EXPORT(project_backward, float, float32)
EXPORT(project_backward, double, float64)
EXPORT(finish_forward, float, float32)
EXPORT(finish_forward, double, float64)
EXPORT(finish_backward, float, float32)
EXPORT(finish_backward, double, float64)
