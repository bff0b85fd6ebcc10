// Sums over raster-earlier pixels that fade by their offset: y = xᵀ Σ λ_row^(r-r') λ_col^|c-c'| a' b'ᵀ, one matrix a pixel.
//
// With X = a bᵀ of every pixel, three matrices go over the grid:
//     A[r, c] = λ_row (A + X)[r-1, c]                  earlier rows, by column
//     P[r, c] = A[r, c] + λ_col (P + X)[r, c-1]        of them and the own row: what is here or to the left
//     R[r, c] = λ_col (A + R)[r, c+1]                  of them: what is to the right
//     y[r, c] = xᵀ (P + R)
// A row is read twice, from the left for P and from the right for R and the next A.  Turned by 180° the same sums are over
// later pixels.  That serves all gradients, g being that of the output:
//     out: x = q, a = k, b = v;   dq: x = g, a = v, b = k;   turned, dk: x = v, a = g, b = q;   dv: x = k, a = q, b = g.
// A tile of ROWS rows of the matrices by one vector goes over the whole grid: P and R stay in registers, A in memory.
#include <algorithm>
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace {

struct Problem {
    int64_t batch, heads, height, width, rows, lanes, turned;  // rows and lanes of X: as many as a and b have channels
    int64_t pixels() const { return height * width; }
};

constexpr int ROWS = 8;  // of a tile: A of 64 columns then stays in L1

template <typename T, int LANES> struct Worker {
    using S = Simd<T, LANES>;
    using V = typename S::V;

    // A grid row's pixels, `pitch` numbers from one to the next, which is negative where the grid is turned.
    struct Line {
        T* data;
        int64_t pitch;
        T* at(int64_t col) const { return data + col * pitch; }
    };

    const Problem& p;
    std::vector<T> memory;
    T *above, *sums, *values;  // A (width, ROWS, LANES); y and, where b has no whole vectors, b of a row (width, LANES)

    explicit Worker(const Problem& p) : p(p) {
        memory.resize(p.width * (ROWS + 2) * LANES + WIDEST / sizeof(T));
        above = aligned(memory.data());
        sums = above + p.width * ROWS * LANES, values = sums + p.width * LANES;
    }

    Line line(const View<T>& x, int64_t b, int64_t h, int64_t row, int64_t channel) const {
        T* at = x.at(b, h) + channel;
        if (p.turned) return {at + (p.pixels() - 1 - row * p.width) * x.slot, -x.slot};
        return {at + row * p.width * x.slot, x.slot};
    }

    // P from the left: the row's sums over what is here or to the left.
    template <int N> void from_left(Line x, Line a, Line b, T fade) {
        V kept[N]{};
        for (int64_t col = 0; col < p.width; col++) {
            const T *read = x.at(col), *key = a.at(col), *base = above + col * N * LANES;
            V value = fade * S::load(b.at(col)), sum[2]{};
            for (int r = 0; r < N; r++) {
                V here = S::load(base + r * LANES) + kept[r];  // P
                sum[r % 2] += read[r] * here;
                kept[r] = fade * here + key[r] * value;
            }
            S::store(sums + col * LANES, sum[0] + sum[1]);
        }
    }

    // R from the right, and A for the row below.
    template <int N> void from_right(Line x, Line a, Line b, T fade, T down) {
        V kept[N]{};
        for (int64_t col = p.width - 1; col >= 0; col--) {
            const T *read = x.at(col), *key = a.at(col);
            T* base = above + col * N * LANES;
            V value = down * S::load(b.at(col)), sum[2]{};
            for (int r = 0; r < N; r++) {
                V here = S::load(base + r * LANES);
                sum[r % 2] += read[r] * kept[r];
                kept[r] = fade * (here + kept[r]);
                S::store(base + r * LANES, down * here + key[r] * value);
            }
            S::store(sums + col * LANES, S::load(sums + col * LANES) + sum[0] + sum[1]);
        }
    }

    // Rows [first, first + N) of the matrices, lanes from `lane` on, over the whole grid.
    template <int N>
    void tile(int64_t b, int64_t h, int64_t first, int64_t lane, const View<T> (&in)[3], const View<T>& out, T down, T fade) {
        int count = int(std::min<int64_t>(LANES, p.lanes - lane));
        std::fill_n(above, p.width * N * LANES, T(0));
        for (int64_t row = 0; row < p.height; row++) {
            Line x = line(in[0], b, h, row, first), a = line(in[1], b, h, row, first), v = line(in[2], b, h, row, lane);
            Line y = line(out, b, h, row, lane);
            if (count < LANES) {
                for (int64_t col = 0; col < p.width; col++) S::store(values + col * LANES, S::load(v.at(col), count));
                v = {values, LANES};
            }
            from_left<N>(x, a, v, fade);
            from_right<N>(x, a, v, fade, down);
            for (int64_t col = 0; col < p.width; col++) {
                V sum = S::load(sums + col * LANES);
                S::store(y.at(col), first ? sum + S::load(y.at(col), count) : sum, count);
            }
        }
    }

    void scan(int64_t b, int64_t h, int64_t lane, const View<T> (&in)[3], const View<T>& out, T down, T fade) {
        int64_t first = 0;
        auto by = [&](auto n) {
            constexpr int N = decltype(n)::value;
            for (; p.rows - first >= N; first += N) tile<N>(b, h, first, lane, in, out, down, fade);
        };
        by(std::integral_constant<int, ROWS>{});
        by(std::integral_constant<int, 4>{});
        by(std::integral_constant<int, 1>{});
    }
};

template <typename T, int LANES>
void run(const Problem& p, int threads, const View<T> (&in)[3], const View<T>& out, const T* fades) {
    int64_t across = (p.lanes + LANES - 1) / LANES, jobs = p.batch * p.heads * across;
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, jobs)));
    std::vector<std::unique_ptr<Worker<T, LANES>>> workers(threads);
    for (auto& worker : workers) worker = std::make_unique<Worker<T, LANES>>(p);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; job++) {
#ifdef _OPENMP
        Worker<T, LANES>& worker = *workers[omp_get_thread_num()];
#else
        Worker<T, LANES>& worker = *workers[0];
#endif
        int64_t h = job / across % p.heads;
        worker.scan(job / across / p.heads, h, job % across * LANES, in, out, fades[h], fades[p.heads + h]);
    }
}

template <typename T> void choose(const Problem& p, int threads, void** at, const int64_t (*strides)[3]) {
    constexpr int WHOLE = WIDEST / sizeof(T);
    View<T> in[3] = {{at[0], strides[0]}, {at[1], strides[1]}, {at[2], strides[2]}}, out(at[3], strides[3]);
    const T* fades = static_cast<const T*>(at[4]);
    if (p.lanes > WHOLE / 2) run<T, WHOLE>(p, threads, in, out, fades);
    else run<T, WHOLE / 2>(p, threads, in, out, fades);  // a small head would leave half of each vector empty
}

}  // namespace

// shape: batch, heads, height, width, rows, lanes, turned.
// x, a (batch, heads, height·width, rows), b, y (…, lanes), fades (2, heads): λ_row and λ_col.
#define EXPORT(T, type)                                                                                             \
    extern "C" int decay2d_##type(const int64_t* s, double, int threads, void** at, const int64_t (*strides)[3]) {  \
        Problem p{s[0], s[1], s[2], s[3], s[4], s[5], s[6]};                                                        \
        return guarded([&] { choose<T>(p, threads, at, strides); });                                                \
    }
EXPORT(float, float32)
EXPORT(double, float64)
