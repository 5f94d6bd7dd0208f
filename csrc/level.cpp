// One instruction set: compiled once for each, with REGARD_LEVEL its name.
#include "level.hpp"

#include <atomic>

#include "attend.hpp"
#include "shifted.hpp"

namespace {

// The numbers 0 .. count, which threads take one by one, for rows differ in how many keys they see; and a gate for what
// needs them all.
class Stage {
public:
    explicit Stage(int64_t count) : count(count) {}
    const int64_t count;

    // work(n) of the numbers that this thread gets to take.
    template <class Work>
    void run(Work work) {
        for (int64_t n; (n = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
            work(n);
            done_.fetch_add(1, std::memory_order_release);
        }
    }
    void wait(const regard_threads& threads) const {
        while (done_.load(std::memory_order_acquire) < count) threads.yield();
    }

private:
    std::atomic<int64_t> next_{0}, done_{0};
};

// work() on all threads, at most `most`.
template <class Work>
void on_threads(const regard_threads& threads, int64_t most, Work& work) {
    threads.run([](void* context) { (*static_cast<Work*>(context))(); }, &work, most);
}

// Keys are laid out once for each that differ, a BLOCK of their columns being a piece of that work.
struct Layout {
    int64_t outer, groups, blocks, each;  // how many differ along either leading dimension; of one: BLOCKs, floats

    explicit Layout(const regard_problem& p)
        : outer(p.key.outer == 0 ? 1 : p.outer),
          groups(p.key.inner == 0 ? 1 : p.inner / p.group),
          blocks(Sizes(p).blocks),
          each(Keys::count(Sizes(p))) {}
    int64_t distinct() const { return outer * groups; }
    int64_t pieces() const { return distinct() * blocks; }
    int64_t index(const Place& at) const { return (outer == 1 ? 0 : at.outer) * groups + (groups == 1 ? 0 : at.group); }
};

template <class Pair>
void prepare_piece(const regard_problem& p, const Layout& layout, int64_t piece, int64_t first, float* prepared,
                   float* blocked) {
    const Sizes sizes(p);
    const int64_t n = piece / layout.blocks;
    const Place at = Place::of_keys(n / layout.groups, n % layout.groups);
    const int64_t where = p.prepared ? at.outer * p.prepared_outer + at.group * p.prepared_inner : n * layout.each;
    prepare<Pair>(p, at, static_cast<int>(piece % layout.blocks), first, prepared + where,
                  blocked ? blocked + n * sizes.keys * sizes.padded() : nullptr);
}

template <class Pair>
int prepare_all(const regard_problem& p, const regard_threads& threads, int64_t first) {
    const Layout layout(p);
    Stage preparing(layout.pieces());
    auto work = [&] {
        preparing.run([&](int64_t piece) { prepare_piece<Pair>(p, layout, piece, first, p.prepared, nullptr); });
    };
    on_threads(threads, preparing.count, work);
    return REGARD_OK;
}

// compute(p, keys, map, scratch) for every ROWS rows of every map.
template <class Pair, class Compute>
int by_rows(const regard_problem& p, const regard_threads& threads, Compute compute) {
    const Layout layout(p);
    const Sizes sizes(p);
    const int64_t blocks = (p.queries + ROWS - 1) / ROWS;
    float* prepared;
    Arena arena([&](Arena& its) { prepared = its.take<float>(p.prepared ? 0 : layout.distinct() * layout.each); });
    if (!arena) return REGARD_NO_MEMORY;
    Stage preparing(p.prepared ? 0 : layout.pieces()), computing(p.outer * p.inner * blocks);
    std::atomic<bool> fine{true};
    auto work = [&] {
        preparing.run([&](int64_t piece) { prepare_piece<Pair>(p, layout, piece, 0, prepared, nullptr); });
        Scratch scratch{};
        Arena memory([&](Arena& its) { lay_out(its, p, false, scratch); });
        preparing.wait(threads);
        if (!memory) fine = false;
        if (!fine) return;
        int64_t folded = -1;
        computing.run([&](int64_t n) {
            const int64_t map = n / blocks;
            const Place at(p, map);
            if (folded != map) fold<Pair>(p, sizes, at.inner, scratch.constants);
            folded = map;
            scratch.rows.first = static_cast<int>(n % blocks * ROWS);
            scratch.rows.count = static_cast<int>(least<int64_t>(ROWS, p.queries - scratch.rows.first));
            const float* laid = p.prepared ? p.prepared + at.outer * p.prepared_outer + at.group * p.prepared_inner
                                           : prepared + layout.index(at) * layout.each;
            compute(p, Keys(laid, sizes), map, scratch);
        });
        threads.went(scratch.paths);
    };
    on_threads(threads, computing.count, work);
    return fine ? REGARD_OK : REGARD_NO_MEMORY;
}

// A unit of work is SHARE keys of a map.
template <class Pair>
int score_all_moved(const regard_problem& p, const regard_threads& threads) {
    const int64_t shares = (p.keys + SHARE - 1) / SHARE;
    Stage computing(p.outer * p.inner * shares);
    std::atomic<bool> fine{true};
    auto work = [&] {
        Shifted scratch;
        Arena memory([&](Arena& its) { lay_out(its, p, scratch); });
        if (!memory) fine = false;
        int64_t read = -1;
        computing.run([&](int64_t n) {
            if (!fine) return;
            const int64_t map = n / shares, start = n % shares * SHARE;
            const Place at(p, map);
            if (read != map) read_map(p, at, scratch);
            read = map;
            if (p.filters) convolve(p, at, start, scratch);
            for (int64_t j = start; j < least(start + SHARE, p.keys); j += MOVED)
                score_moved<Pair>(p, at, start, j, scratch, p.scores + map * p.keys + j);
        });
    };
    on_threads(threads, computing.count, work);
    return fine ? REGARD_OK : REGARD_NO_MEMORY;
}

// A unit of work is a map.
int read_all(const regard_problem& p, const regard_threads& threads) {
    const Sizes sizes(p);
    Stage computing(p.outer * p.inner);
    std::atomic<bool> fine{true};
    auto work = [&] {
        float *values, *out;
        Arena memory([&](Arena& its) {
            values = its.take<float>(static_cast<int64_t>(TILE) * sizes.width), out = its.take<float>(sizes.width);
        });
        if (!memory) fine = false;
        computing.run([&](int64_t map) {
            if (!fine) return;
            const Place at(p, map);
            const float* weights = p.scores + map * p.keys;
            std::memset(out, 0, sizeof(float) * static_cast<size_t>(sizes.width));
            for (int tile = 0; tile < sizes.tiles; ++tile) {
                const int64_t start = static_cast<int64_t>(tile) * TILE;
                const int count = static_cast<int>(least<int64_t>(TILE, p.keys - start));
                int64_t stride;
                const float* rows = value_rows(p, sizes, at, tile, 0, count, values, stride);
                product(weights + start, p.keys, 1, rows, stride, out, sizes.width, 1, sizes.width, count);
            }
            write_row(p.out, at.outer, at.inner, 0, static_cast<int>(p.width), out);
        });
    };
    on_threads(threads, computing.count, work);
    return fine ? REGARD_OK : REGARD_NO_MEMORY;
}

// Adds the `count` numbers that lie `away` to those here.
template <class T>
void add(T* to, int64_t away, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += to[away + i];
}

// Each map is shared among `splits` units, which sum what keys and values get on their own, where maps are too few
// to keep all threads at work.
template <class Pair>
int backward_all(const regard_problem& p, const regard_threads& threads) {
    const Layout layout(p);
    const Sizes sizes(p);
    const int64_t n = sizes.padded(), maps = p.outer * p.inner, blocks = (p.queries + ROWS - 1) / ROWS;
    const int64_t keys_size = sizes.keys * n,
                  values_size = p.grad_scores ? 0 : static_cast<int64_t>(sizes.keys) * sizes.width;
    const int64_t most_splits =
        most<int64_t>(1, (int64_t{64} << 20) / most<int64_t>(1, maps * (keys_size + values_size) * 4));
    const int64_t units = threads.count() == 1 ? 1 : 2 * threads.count();  // that are wanted
    const int64_t splits =
        most<int64_t>(1, least(least((units + maps - 1) / most<int64_t>(1, maps), blocks), most_splits));
    const int64_t distinct = layout.distinct();
    // One unit needs its sums only until they are written; several keep them until all are done.
    const int64_t waiting = splits == 1 ? 0 : maps * splits;
    float *prepared, *blocked, *all_keys, *all_values;
    double* all_v;
    Arena arena([&](Arena& its) {
        prepared = its.take<float>(distinct * layout.each), blocked = its.take<float>(distinct * keys_size);
        all_keys = its.take<float>(waiting * keys_size), all_values = its.take<float>(waiting * values_size);
        all_v = its.take<double>(waiting * (n + 1));
    });
    if (!arena) return REGARD_NO_MEMORY;

    auto write_keys = [&](int64_t map, const float* v, const float* keys, const float* values, int64_t first,
                          int64_t last) {
        for (int64_t j = first; p.grad_key && j < last; ++j)
            for (int64_t h = 0; h < p.hidden; ++h)
                p.grad_key[(map * p.keys + j) * p.hidden + h] =
                    Pair::key_sign * Pair::slope_scale(v, h) * keys[(h / BLOCK * sizes.keys + j) * BLOCK + h % BLOCK];
        for (int64_t j = first; p.grad_value && j < last; ++j)
            std::memcpy(p.grad_value + (map * p.keys + j) * p.width, values + j * sizes.width,
                        sizeof(float) * static_cast<size_t>(p.width));
    };
    auto write_v = [&](int64_t map, const double* grad_v) {
        if (p.grad_v)
            for (int64_t h = 0; h < p.hidden; ++h)
                p.grad_v[map * p.hidden + h] = static_cast<float>(Pair::v_gradient(grad_v[h], grad_v[n]));
    };
    const int64_t tiles = most(1, sizes.tiles);  // one at least, to write v's gradient
    Stage preparing(layout.pieces()), computing(maps * splits), gathering(waiting ? maps * tiles : 0);
    std::atomic<bool> fine{true};
    auto work = [&] {
        preparing.run([&](int64_t piece) { prepare_piece<Pair>(p, layout, piece, 0, prepared, blocked); });
        Scratch scratch{};
        float *own_keys, *own_values;
        double* own_v;
        const int64_t own = waiting ? 0 : 1;
        Arena memory([&](Arena& its) {
            lay_out(its, p, true, scratch);
            own_keys = its.take<float>(own * keys_size), own_values = its.take<float>(own * values_size);
            own_v = its.take<double>(own * (n + 1));
        });
        preparing.wait(threads);
        if (!memory) fine = false;
        int64_t transposed = -1;
        computing.run([&](int64_t unit) {
            if (!fine) return;
            const int64_t map = unit / splits, split = unit % splits;
            const Place at(p, map);
            Sums sums{waiting ? all_keys + unit * keys_size : own_keys,
                      waiting ? all_values + unit * values_size : own_values, waiting ? all_v + unit * (n + 1) : own_v,
                      0.0};
            std::memset(sums.keys, 0, sizeof(float) * static_cast<size_t>(keys_size));
            if (values_size) std::memset(sums.values, 0, sizeof(float) * static_cast<size_t>(values_size));
            std::memset(sums.v, 0, sizeof(double) * static_cast<size_t>(n + 1));
            fold<Pair>(p, sizes, at.inner, scratch.constants);
            if (!p.grad_scores && transposed != map) transpose_values(p, sizes, at, scratch.values, scratch.transposed);
            transposed = map;
            const int64_t which = layout.index(at);
            for (int64_t b = blocks * split / splits; b < blocks * (split + 1) / splits; ++b) {
                scratch.rows.first = static_cast<int>(b * ROWS);
                scratch.rows.count = static_cast<int>(least<int64_t>(ROWS, p.queries - b * ROWS));
                backward_rows<Pair>(p, Keys(prepared + which * layout.each, sizes), blocked + which * keys_size, map,
                                    scratch, sums);
            }
            sums.v[n] = sums.g;
            if (waiting) return;
            write_keys(map, scratch.constants.v, sums.keys, sums.values, 0, p.keys);
            write_v(map, sums.v);
        });
        threads.went(scratch.paths);
        if (gathering.count == 0) return;
        computing.wait(threads);
        gathering.run([&](int64_t piece) {
            const int64_t map = piece / tiles, tile = piece % tiles;
            const int64_t first = tile * TILE, last = least<int64_t>(first + TILE, p.keys);
            float *keys = all_keys + map * splits * keys_size, *values = all_values + map * splits * values_size;
            double* v = all_v + map * splits * (n + 1);
            for (int64_t split = 1; split < splits; ++split) {
                for (int64_t b = 0; b < sizes.blocks; ++b)
                    add(keys + (b * sizes.keys + first) * BLOCK, split * keys_size, (last - first) * BLOCK);
                if (values_size) add(values + first * sizes.width, split * values_size, (last - first) * sizes.width);
                if (tile == 0) add(v, split * (n + 1), n + 1);
            }
            write_keys(map, p.v ? p.v + map % p.inner % p.v_heads * p.hidden : nullptr, keys, values, first, last);
            if (tile == 0) write_v(map, v);
        });
    };
    on_threads(threads, computing.count, work);
    return fine ? REGARD_OK : REGARD_NO_MEMORY;
}

template <class Run>
int with_pair(const regard_problem& p, Run run) {
    switch (p.pair) {
        case REGARD_TANH: return run(Rational<2>{});
        case REGARD_SIGMOID: return run(Rational<1>{});
        case REGARD_LEAKY_RELU: return run(Rectified{});
        default: return run(Distance{});
    }
}

int64_t prepared_count(const regard_problem* p) { return Layout(*p).each; }

int prepare_keys(const regard_problem* p, const regard_threads* threads, int64_t first) {
    return with_pair(*p, [&](auto pair) { return prepare_all<decltype(pair)>(*p, *threads, first); });
}

int forward(const regard_problem* p, const regard_threads* threads) {
    return with_pair(*p,
                     [&](auto pair) { return by_rows<decltype(pair)>(*p, *threads, forward_rows<decltype(pair)>); });
}

int scores(const regard_problem* p, const regard_threads* threads) {
    return with_pair(
        *p, [&](auto pair) { return by_rows<decltype(pair)>(*p, *threads, score_whole_rows<decltype(pair)>); });
}

int shifted_scores(const regard_problem* p, const regard_threads* threads) {
    switch (p->pair) {
        case REGARD_TANH: return score_all_moved<Rational<2>>(*p, *threads);
        case REGARD_SIGMOID: return score_all_moved<Rational<1>>(*p, *threads);
        default: return score_all_moved<Rectified>(*p, *threads);
    }
}

int read(const regard_problem* p, const regard_threads* threads) { return read_all(*p, *threads); }

int backward(const regard_problem* p, const regard_threads* threads) {
    return with_pair(*p, [&](auto pair) { return backward_all<decltype(pair)>(*p, *threads); });
}

}  // namespace

#define REGARD_NAMED(level) regard_##level
#define REGARD_LEVEL_NAME(level) REGARD_NAMED(level)

extern const regard_level REGARD_LEVEL_NAME(REGARD_LEVEL) = {prepared_count, prepare_keys, forward, scores,
                                                             shifted_scores, read,         backward};
