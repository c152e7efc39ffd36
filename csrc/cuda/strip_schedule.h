#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define STS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STS_HOST_DEVICE inline
#endif

/// Which tiles each cluster of a persistent kernel computes, and in which order.
///
/// The product has n_strips strips of features and n_tiles tiles of tokens. Numbered strip by strip, its
/// n_strips * n_tiles places are cut into lanes_n equal ranges, and each range is dealt to lanes_m clusters in turn.
/// So all clusters get the same number of tiles, give or take one, and a cluster stays in a strip as long as it can and
/// keeps the sums of its features. All ranges go through the tiles of tokens in step, from the first one on and around,
/// so that at any time only lanes_n strips of W_enc and lanes_m tiles of tokens are read: the L2 cache holds them, and
/// memory is read lanes_n times less often than by clusters on their own. Only the last, incomplete strip of a range
/// is out of step, since it gets the tiles that the next range's first one leaves over.
namespace sts::cuda {

/// The places begin, begin + step, ... below end of a cluster, in the range of places [first, end) of its lane.
struct TileRange {
    int64_t begin, end, step, first;
};

struct StripSchedule {
    int64_t n_strips, n_tiles;
    int lanes_n, lanes_m;

    STS_HOST_DEVICE int n_clusters() const { return lanes_n * lanes_m; }

    STS_HOST_DEVICE int64_t lane_begin(int64_t lane_n) const { return n_strips * n_tiles * lane_n / lanes_n; }

    /// The range that holds a place: the last one that begins at or before it.
    STS_HOST_DEVICE int64_t lane_of(int64_t place) const { return (lanes_n * (place + 1) - 1) / (n_strips * n_tiles); }

    STS_HOST_DEVICE TileRange tiles_of(int cluster) const {
        const int lane_n = cluster / lanes_m, lane_m = cluster % lanes_m;
        return {lane_begin(lane_n) + lane_m, lane_begin(lane_n + 1), lanes_m, lane_begin(lane_n)};
    }

    /// The tile of tokens at a place.
    STS_HOST_DEVICE int64_t token_tile(const TileRange& range, int64_t place) const {
        const int64_t strip_begin = place / n_tiles * n_tiles, strip_end = strip_begin + n_tiles;
        const int64_t begin = range.first > strip_begin ? range.first : strip_begin;
        const int64_t end = range.end < strip_end ? range.end : strip_end;
        // Ranges that share a strip take its tiles from the last one down, each its own in ascending order.
        if (end - begin < n_tiles) return strip_end - end + place - begin;
        return (place - range.first) % n_tiles;
    }

    /// Where a cluster puts its partial sums of a strip; two clusters never share the slot of one strip.
    STS_HOST_DEVICE int64_t slot_of(int cluster, int64_t strip) const {
        const int lane_n = cluster / lanes_m, lane_m = cluster % lanes_m;
        return (lane_n - lane_of(strip * n_tiles)) * lanes_m + lane_m;
    }

    /// Slots that a strip has at most.
    int64_t n_slots() const {
        int64_t lanes = 0;
        for (int64_t strip = 0; strip < n_strips; ++strip) {
            const int64_t touched = lane_of((strip + 1) * n_tiles - 1) - lane_of(strip * n_tiles) + 1;
            lanes = touched > lanes ? touched : lanes;
        }
        return lanes * lanes_m;
    }
};

/// The schedule for at most max_clusters clusters that keeps most of them busy while lanes_n strips, each of
/// strip_bytes, fit into cache_bytes; of equals, the one with the fewest partial sums.
inline StripSchedule make_schedule(int64_t n_strips, int64_t n_tiles, int max_clusters, int64_t strip_bytes,
                                   int64_t cache_bytes) {
    const int64_t total = n_strips * n_tiles;
    const int clusters = total < max_clusters ? static_cast<int>(total) : max_clusters;
    StripSchedule best{n_strips, n_tiles, 1, clusters};
    for (int lanes_m = clusters - 1; lanes_m >= 1; --lanes_m) {
        const int lanes_n = clusters / lanes_m;
        if (lanes_n * strip_bytes > cache_bytes) break;
        if (lanes_n * lanes_m >= best.n_clusters()) best = {n_strips, n_tiles, lanes_n, lanes_m};
    }
    return best;
}

/// The stage of a circular buffer and the parity of its turn, which the wait on its barrier takes.
struct PipelineStage {
    int n_stages, index = 0;
    uint32_t parity = 0;

    STS_HOST_DEVICE explicit PipelineStage(int n) : n_stages(n) {}
    STS_HOST_DEVICE void advance() {
        if (++index == n_stages) {
            index = 0;
            parity ^= 1;
        }
    }
};

}  // namespace sts::cuda
