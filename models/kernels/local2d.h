// What the two ways of local2d.cpp share.
#pragma once
#include "jobs.h"
#include "simd.h"

namespace {

struct Problem {
    int64_t batch, heads, height, width, dim, radius;
    double scale;  // of the scores: 1/√dim
    int64_t images() const { return batch * heads; }
    int64_t pixels() const { return height * width; }
    int64_t offsets(int64_t above) const { return above ? 2 * radius + 1 : radius; }
    int64_t first(int64_t above) const { return 1 + (radius - above) * (2 * radius + 1); }
    int64_t all() const { return 1 + radius * (2 * radius + 1) + radius; }
    // Bands of rows are computed on their own; their number follows from the shape alone, and with it all rounding.
    int64_t bands(int64_t groups) const {
        int64_t wanted = (16 + groups - 1) / std::max<int64_t>(1, groups);
        return std::max<int64_t>(1, std::min(wanted, height / (4 * std::max<int64_t>(1, radius))));
    }
};

// Where the gradients of an image's start token (2, dim) and of its bias go, which are sums over a band; biases may be null.
template <typename T> struct Sums {
    const Problem& p;
    T *starts, *biases;
    int64_t bands, band;
    T* start(int64_t image) const { return starts + (image * bands + band) * 2 * p.dim; }
    T* bias(int64_t image) const { return biases ? biases + (image * bands + band) * p.all() : nullptr; }
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Groups of images that a way takes at a time.
template <typename Way> int64_t groups(const Problem& p) { return (p.images() + Way::STEP - 1) / Way::STEP; }

constexpr double LOG2E = 1.4426950408889634074;

}  // namespace
