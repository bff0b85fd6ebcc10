// Products of matrices on vectors of LANES numbers, BYTES long: tiles of the result in registers, all of a tile's terms at once.
#pragma once
#include <algorithm>

#include "simd.h"

template <typename T, int BYTES = WIDEST> struct Product {
    static constexpr int LANES = BYTES / sizeof(T);
    static constexpr int SUMS = WIDEST >= 64 ? 24 : 12;  // vectors that a tile keeps in registers
    static constexpr int WIDE = SUMS / 6, PANEL = WIDE * LANES;
    using S = Simd<T, LANES>;
    using V = typename S::V;

    // c[m][lane] = Σ_k a[m·m_step + k·k_step] b[k][lane] for M rows and N vectors, or with ADD += that; of the last
    // vector `last` lanes count.
    template <bool ADD, int M, int N>
    static INLINE void tile(int64_t depth, const T* a, int64_t m_step, int64_t k_step, const T* b, int64_t b_pitch, T* c,
                            int64_t c_pitch, int last) {
        V sums[M][N]{};
        for (int64_t k = 0; k < depth; k++) {
            V row[N];
            for (int n = 0; n < N; n++) row[n] = S::load(b + k * b_pitch + n * LANES);
            for (int m = 0; m < M; m++) {
                T x = a[m * m_step + k * k_step];
                for (int n = 0; n < N; n++) sums[m][n] += x * row[n];
            }
        }
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                T* to = c + m * c_pitch + n * LANES;
                int count = n == N - 1 ? last : LANES;
                S::store(to, ADD ? S::load(to, count) + sums[m][n] : sums[m][n], count);
            }
    }

    // The same for any number of rows.
    template <bool ADD, int N>
    static void rows(int64_t count, int64_t depth, const T* a, int64_t m_step, int64_t k_step, const T* b, int64_t b_pitch,
                     T* c, int64_t c_pitch, int last) {
        constexpr int M = N == 1 ? 16 * SUMS / 24 : SUMS / N;
        // The last eight as two fours: not as six, one and one.
        for (; count >= M && !(M == 6 && count == 8); count -= M, a += M * m_step, c += M * c_pitch)
            tile<ADD, M, N>(depth, a, m_step, k_step, b, b_pitch, c, c_pitch, last);
        for (; count >= 4; count -= 4, a += 4 * m_step, c += 4 * c_pitch)
            tile<ADD, 4, N>(depth, a, m_step, k_step, b, b_pitch, c, c_pitch, last);
        for (; count; count--, a += m_step, c += c_pitch)
            tile<ADD, 1, N>(depth, a, m_step, k_step, b, b_pitch, c, c_pitch, last);
    }

    // The same for any number of lanes.  Vectors of b are read whole.
    template <bool ADD>
    static void any(int64_t count, int64_t lanes, int64_t depth, const T* a, int64_t m_step, int64_t k_step, const T* b,
                    int64_t b_pitch, T* c, int64_t c_pitch) {
        while (lanes > 0) {
            int64_t wide = lanes > (WIDE - 1) * LANES ? WIDE : lanes > LANES ? 2 : 1;
            int last = int(std::min<int64_t>(LANES, lanes - (wide - 1) * LANES));
            if (wide == WIDE) rows<ADD, WIDE>(count, depth, a, m_step, k_step, b, b_pitch, c, c_pitch, last);
            else if (wide == 2) rows<ADD, 2>(count, depth, a, m_step, k_step, b, b_pitch, c, c_pitch, last);
            else rows<ADD, 1>(count, depth, a, m_step, k_step, b, b_pitch, c, c_pitch, last);
            lanes -= wide * LANES, b += wide * LANES, c += wide * LANES;
        }
    }
};
