// The families of launchers that only training has, for Python.
#include "bindings.h"

#include <algorithm>
#include <iterator>
#include <optional>

namespace bindings {
namespace {

p3d::Read read(const std::string& name) {
    static const char* const names[] = {"raw",    "bn_relu", "join_port", "join_b",
                                        "join_c", "masked",  "bn_bwd",    "bn_bwd_open"};
    const auto* found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) throw py::value_error("read: expected one of conv_wgrad's, got " + name);
    return p3d::Read(found - names);
}

p3d::WgradOperand operand(p3d::Read read, uintptr_t a, uintptr_t b, uintptr_t affine_a, uintptr_t affine_b,
                          uintptr_t sums) {
    return {read,
            pointer<const void>(a),
            pointer<const void>(b),
            pointer<const float>(affine_a),
            pointer<const float>(affine_b),
            pointer<const float>(sums)};
}

// (N, T, H, W, Ci, Co, taps, stride, g on the grid of x, totals, g is x, read of g, read of x)
using ConvWgradSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool, bool, bool,
                                  std::string, std::string>;

p3d::ConvWgradShape conv_wgrad_shape(const ConvWgradSizes& sizes) {
    const auto& [clips, time, height, width, ci, co, taps, stride, strided, totals, same, g_read, x_read] = sizes;
    return {clips, time, height, width, ci, co, taps, stride, strided, totals, same, read(g_read), read(x_read)};
}

void define_conv_wgrad(Module& m) {
    m.def(
        "conv_wgrad",
        [](uintptr_t g_a, uintptr_t g_b, uintptr_t g_affine_a, uintptr_t g_affine_b, uintptr_t g_sums, uintptr_t x_a,
           uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t x_sums, uintptr_t centre,
           uintptr_t partials, const ConvWgradSizes& sizes, const std::string& dtype_name, uintptr_t stream) {
            p3d::ConvWgrad p{};
            p.shape = conv_wgrad_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.g = {p.shape.g_read,
                   pointer<const void>(g_a),
                   pointer<const void>(g_b),
                   pointer<const float>(g_affine_a),
                   pointer<const float>(g_affine_b),
                   pointer<const float>(g_sums)};
            p.x = {p.shape.x_read,
                   pointer<const void>(x_a),
                   pointer<const void>(x_b),
                   pointer<const float>(x_affine_a),
                   pointer<const float>(x_affine_b),
                   pointer<const float>(x_sums)};
            p.centre = pointer<const float>(centre);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::conv_wgrad(p));
        },
        py::arg("g_a"), py::arg("g_b"), py::arg("g_affine_a"), py::arg("g_affine_b"), py::arg("g_sums"), py::arg("x_a"),
        py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("x_sums"), py::arg("centre"),
        py::arg("partials"), py::arg("sizes"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "conv_wgrad_why_not",
        [](const ConvWgradSizes& sizes) { return p3d::conv_wgrad_why_not(conv_wgrad_shape(sizes)); }, py::arg("sizes"));

    m.def(
        "conv_wgrad_partials",
        [](const ConvWgradSizes& sizes) { return p3d::conv_wgrad_partials(conv_wgrad_shape(sizes)); },
        py::arg("sizes"));
}

// (N, T, H, W, Ci, Co, taps, stride, g on the grid of x), and (columns, splits) of a tile
using RawWgradSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool>;
using RawWgradTile = std::array<int, 2>;

p3d::RawWgradShape raw_wgrad_shape(const RawWgradSizes& sizes) {
    return std::apply([](auto... size) { return p3d::RawWgradShape{size...}; }, sizes);
}

void define_raw_wgrad(Module& m) {
    m.def(
        "raw_wgrad",
        [](const Addresses& addresses, const std::vector<RawWgradSizes>& sizes, const std::vector<RawWgradTile>& tiles,
           const std::string& dtype_name, uintptr_t stream) {  // of each g, x, partials; (columns, splits)
            if (addresses.size() != 3 * sizes.size() || tiles.size() != sizes.size())
                throw py::value_error("addresses, tiles: expected three and one of each size");
            std::vector<p3d::RawWgrad> p(sizes.size());
            for (size_t i = 0; i < p.size(); ++i)
                p[i] = {raw_wgrad_shape(sizes[i]),
                        {tiles[i][0], tiles[i][1]},
                        pointer<const void>(addresses[3 * i]),
                        pointer<const void>(addresses[3 * i + 1]),
                        pointer<float>(addresses[3 * i + 2])};
            check(p3d::raw_wgrad(p.data(), int(p.size()), dtype(dtype_name), pointer<CUstream_st>(stream)));
        },
        py::arg("addresses"), py::arg("sizes"), py::arg("tiles"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "raw_wgrad_plan",
        [](const std::vector<RawWgradSizes>& sizes, const std::vector<RawWgradTile>& tiles) {
            if (tiles.size() != sizes.size()) throw py::value_error("tiles: expected one of each size");
            std::vector<p3d::RawWgradShape> shapes;
            std::vector<p3d::RawWgradTile> plan;
            for (const auto& size : sizes) shapes.push_back(raw_wgrad_shape(size));
            for (const auto& [columns, splits] : tiles) plan.push_back({columns, splits});
            check(p3d::raw_wgrad_plan(plan.data(), shapes.data(), int(shapes.size())));
            std::vector<RawWgradTile> found;
            for (const auto& tile : plan) found.push_back({tile.columns, tile.splits});
            return found;
        },
        py::arg("sizes"), py::arg("tiles"));

    m.def(
        "raw_wgrad_why_not", [](const RawWgradSizes& sizes) { return p3d::raw_wgrad_why_not(raw_wgrad_shape(sizes)); },
        py::arg("sizes"));
}

// (N, T, H * W, Ci, Co, taps, transposed, read, loads of the epilogue, sums)
using ConvTrainSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int, bool, std::string, int, bool>;

p3d::ConvTrainShape conv_train_shape(const ConvTrainSizes& sizes) {
    const auto& [clips, time, frame, ci, co, taps, transposed, x_read, loads, sums] = sizes;
    return {clips, time, frame, ci, co, taps, transposed, read(x_read), loads, sums};
}

// (W, stride in space, plan) of conv_tiles, which takes the place of conv_train
using ConvTiles = std::optional<std::tuple<int64_t, int, ConvInferPlan>>;

void define_conv_train(Module& m) {
    m.def(
        "conv_train",
        [](uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t x_sums, uintptr_t w,
           uintptr_t y, uintptr_t affine, uintptr_t o, uintptr_t o_mask, uintptr_t below, uintptr_t below_affine,
           uintptr_t partials, const ConvTrainSizes& sizes, bool relu, const std::string& dtype_name, uintptr_t stream,
           const ConvTiles& tiles) {
            p3d::ConvTrain p{};
            p.shape = conv_train_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.x = operand(p.shape.read, x_a, x_b, x_affine_a, x_affine_b, x_sums);
            p.w = pointer<const void>(w);
            p.y = pointer<void>(y);
            p.affine = pointer<const float>(affine);
            p.o = pointer<const void>(o);
            p.o_mask = pointer<const void>(o_mask);
            p.below = pointer<const void>(below);
            p.below_affine = pointer<const float>(below_affine);
            p.relu = relu;
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            if (!tiles) return check(p3d::conv_train(p));
            const auto& [width, stride, plan] = *tiles;
            check(p3d::conv_tiles({p, width, stride, conv_plan(plan)}));
        },
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("x_sums"), py::arg("w"),
        py::arg("y"), py::arg("affine"), py::arg("o"), py::arg("o_mask"), py::arg("below"), py::arg("below_affine"),
        py::arg("partials"), py::arg("sizes"), py::arg("relu"), py::arg("dtype"), py::arg("stream"),
        py::arg("tiles") = ConvTiles{});

    m.def(
        "conv_train_why_not",
        [](const ConvTrainSizes& sizes) { return p3d::conv_train_why_not(conv_train_shape(sizes)); }, py::arg("sizes"));

    m.def(
        "conv_train_partials",
        [](const ConvTrainSizes& sizes) { return p3d::conv_train_partials(conv_train_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "conv_tiles_why_not",
        [](const ConvTrainSizes& sizes, int64_t width, int stride, bool gram) {
            p3d::ConvInferPlan plan{};
            return p3d::conv_tiles_plan(plan, {conv_train_shape(sizes), width, stride, gram}, {});
        },
        py::arg("sizes"), py::arg("width"), py::arg("stride"), py::arg("gram"));

    // A plan and the rows of the partials it leaves.
    m.def(
        "conv_tiles_plan",
        [](const ConvTrainSizes& sizes, int64_t width, int stride, bool gram, const ConvInferTile& wish) {
            p3d::ConvTilesShape shape{conv_train_shape(sizes), width, stride, gram};
            p3d::ConvInferPlan plan{};
            check(p3d::conv_tiles_plan(plan, shape, {wish[0], wish[1], wish[2]}));
            return std::tuple(conv_plan(plan), p3d::conv_tiles_partials(shape, plan));
        },
        py::arg("sizes"), py::arg("width"), py::arg("stride"), py::arg("gram"), py::arg("wish") = ConvInferTile{});
}

// (N * T * H * W, Ci, Ci of down, Co, read)
using ConvPairSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, std::string>;

p3d::ConvPairShape conv_pair_shape(const ConvPairSizes& sizes) {
    const auto& [positions, ci, down, co, x_read] = sizes;
    return {positions, ci, down, co, read(x_read)};
}

void define_conv_pair(Module& m) {
    m.def(
        "conv_pair",
        [](uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t x_sums, uintptr_t w,
           uintptr_t affine, uintptr_t down, uintptr_t w_down, uintptr_t down_affine, uintptr_t y,
           const ConvPairSizes& sizes, const std::string& dtype_name, uintptr_t stream) {
            p3d::ConvPair p{};
            p.shape = conv_pair_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.x = operand(p.shape.read, x_a, x_b, x_affine_a, x_affine_b, x_sums);
            p.w = pointer<const void>(w);
            p.affine = pointer<const float>(affine);
            p.down = pointer<const void>(down);
            p.w_down = pointer<const void>(w_down);
            p.down_affine = pointer<const float>(down_affine);
            p.y = pointer<void>(y);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::conv_pair(p));
        },
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("x_sums"), py::arg("w"),
        py::arg("affine"), py::arg("down"), py::arg("w_down"), py::arg("down_affine"), py::arg("y"), py::arg("sizes"),
        py::arg("dtype"), py::arg("stream"));

    m.def(
        "conv_pair_why_not", [](const ConvPairSizes& sizes) { return p3d::conv_pair_why_not(conv_pair_shape(sizes)); },
        py::arg("sizes"));
}

// (N, T, H, W, Ci, Co, taps, stride in space, transposed, with an o, with below)
using ConvRawSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool, bool, bool>;

p3d::ConvRawShape conv_raw_shape(const ConvRawSizes& sizes) {
    return std::apply([](auto... size) { return p3d::ConvRawShape{size...}; }, sizes);
}

void define_conv_raw(Module& m) {
    m.def(
        "conv_raw",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t o, uintptr_t below, uintptr_t below_affine,
           uintptr_t partials, const ConvRawSizes& sizes, const ConvInferPlan& plan, const std::string& dtype_name,
           uintptr_t stream) {
            p3d::ConvRaw p{};
            p.shape = conv_raw_shape(sizes);
            p.plan = conv_plan(plan);
            p.dtype = dtype(dtype_name);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.o = pointer<const void>(o);
            p.below = pointer<const void>(below);
            p.below_affine = pointer<const float>(below_affine);
            p.y = pointer<void>(y);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::conv_raw(p));
        },
        py::arg("x"), py::arg("w"), py::arg("y"), py::arg("o"), py::arg("below"), py::arg("below_affine"),
        py::arg("partials"), py::arg("sizes"), py::arg("plan"), py::arg("dtype"), py::arg("stream"));

    // A plan and the rows of the partials it leaves.
    m.def(
        "conv_raw_plan",
        [](const ConvRawSizes& sizes, const ConvInferTile& wish) {
            p3d::ConvInferPlan plan{};
            check(p3d::conv_raw_plan(plan, conv_raw_shape(sizes), {wish[0], wish[1], wish[2]}));
            return std::tuple(conv_plan(plan), p3d::conv_raw_partials(conv_raw_shape(sizes), plan));
        },
        py::arg("sizes"), py::arg("wish") = ConvInferTile{});
}

// (N, T * H * W, Ci, Co, masks)
using PointDgradSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;

p3d::PointDgradShape point_dgrad_shape(const PointDgradSizes& sizes) {
    return std::apply([](auto... size) { return p3d::PointDgradShape{size...}; }, sizes);
}

void define_point_dgrad(Module& m) {
    m.def(
        "point_dgrad",
        [](uintptr_t dz, uintptr_t w, uintptr_t o, uintptr_t o_mask, uintptr_t mask, uintptr_t dx,
           const PointDgradSizes& sizes, const ConvInferPlan& plan, const std::string& dtype_name, uintptr_t stream) {
            p3d::PointDgrad p{};
            p.shape = point_dgrad_shape(sizes);
            p.plan = conv_plan(plan);
            p.dtype = dtype(dtype_name);
            p.dz = pointer<const void>(dz);
            p.w = pointer<const void>(w);
            p.o = pointer<const void>(o);
            p.o_mask = pointer<const void>(o_mask);
            p.mask = pointer<const void>(mask);
            p.dx = pointer<void>(dx);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::point_dgrad(p));
        },
        py::arg("dz"), py::arg("w"), py::arg("o"), py::arg("o_mask"), py::arg("mask"), py::arg("dx"), py::arg("sizes"),
        py::arg("plan"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "point_dgrad_why_not",
        [](const PointDgradSizes& sizes) {
            p3d::ConvInferPlan plan{};
            return p3d::point_dgrad_plan(plan, point_dgrad_shape(sizes), {});
        },
        py::arg("sizes"));

    m.def(
        "point_dgrad_plan",
        [](const PointDgradSizes& sizes, const ConvInferTile& wish) {
            p3d::ConvInferPlan plan{};
            check(p3d::point_dgrad_plan(plan, point_dgrad_shape(sizes), {wish[0], wish[1], wish[2]}));
            return conv_plan(plan);
        },
        py::arg("sizes"), py::arg("wish") = ConvInferTile{});
}

// (N * T, H, W, M, Co, read, whether there is y, thin)
using GramBwdSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, std::string, bool, bool>;

p3d::GramBwdShape gram_bwd_shape(const GramBwdSizes& sizes) {
    const auto& [frames, height, width, m, co, x_read, masked, thin] = sizes;
    return {frames, height, width, m, co, read(x_read), masked, thin};
}

// (N, T, H, W, M, Co)
using GramRawSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

p3d::GramRawShape gram_raw_shape(const GramRawSizes& sizes) {
    return std::apply([](auto... size) { return p3d::GramRawShape{size...}; }, sizes);
}

void define_gram(Module& m) {
    m.def(
        "gram_bwd",
        [](uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t g, uintptr_t y,
           uintptr_t affine, uintptr_t w, uintptr_t v, uintptr_t scales, uintptr_t partials, const GramBwdSizes& sizes,
           const std::string& dtype_name, uintptr_t stream) {
            p3d::GramBwd p{};
            p.shape = gram_bwd_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.x = operand(p.shape.read, x_a, x_b, x_affine_a, x_affine_b, 0);
            p.g = pointer<const void>(g);
            p.y = pointer<const void>(y);
            p.affine = pointer<const float>(affine);
            p.w = pointer<const void>(w);
            p.v = pointer<void>(v);
            p.scales = pointer<float>(scales);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::gram_bwd(p));
        },
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("g"), py::arg("y"),
        py::arg("affine"), py::arg("w"), py::arg("v"), py::arg("scales"), py::arg("partials"), py::arg("sizes"),
        py::arg("dtype"), py::arg("stream"));

    m.def(
        "gram_bwd_why_not", [](const GramBwdSizes& sizes) { return p3d::gram_bwd_why_not(gram_bwd_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "gram_bwd_partials", [](const GramBwdSizes& sizes) { return p3d::gram_bwd_partials(gram_bwd_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "gram_add",
        [](uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t v, uintptr_t scales,
           uintptr_t q, uintptr_t q_scale, uintptr_t c, uintptr_t da, uintptr_t partials_a, uintptr_t partials_b,
           int c_parts, int64_t thin_width, const ConvTrainSizes& sizes, const std::string& dtype_name,
           uintptr_t stream) {
            p3d::GramAdd p{};
            p.shape = conv_train_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.x = operand(p.shape.read, x_a, x_b, x_affine_a, x_affine_b, 0);
            p.v = pointer<const void>(v);
            p.scales = pointer<const float>(scales);
            p.q = pointer<const void>(q);
            p.q_scale = pointer<const float>(q_scale);
            p.c = pointer<const float>(c);
            p.c_parts = c_parts;
            p.da = pointer<void>(da);
            p.partials_a = pointer<float>(partials_a);
            p.partials_b = pointer<float>(partials_b);
            p.thin_width = thin_width;
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::gram_add(p));
        },
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("v"), py::arg("scales"),
        py::arg("q"), py::arg("q_scale"), py::arg("c"), py::arg("da"), py::arg("partials_a"), py::arg("partials_b"),
        py::arg("c_parts"), py::arg("thin_width"), py::arg("sizes"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "gram_tiles",
        [](uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t g, uintptr_t y,
           uintptr_t affine, uintptr_t w, uintptr_t q, uintptr_t q_scale, uintptr_t c, uintptr_t da,
           uintptr_t partials_a, uintptr_t partials_b, int c_parts, const ConvTrainSizes& sizes,
           const std::string& dtype_name, uintptr_t stream, int64_t width, int stride, const ConvInferPlan& plan) {
            p3d::GramDgrad p{};
            p.shape = conv_train_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.x = operand(p.shape.read, x_a, x_b, x_affine_a, x_affine_b, 0);
            p.g = pointer<const void>(g);
            p.y = pointer<const void>(y);
            p.affine = pointer<const float>(affine);
            p.w = pointer<const void>(w);
            p.q = pointer<const void>(q);
            p.q_scale = pointer<const float>(q_scale);
            p.c = pointer<const float>(c);
            p.c_parts = c_parts;
            p.da = pointer<void>(da);
            p.partials_a = pointer<float>(partials_a);
            p.partials_b = pointer<float>(partials_b);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::gram_tiles({p, width, stride, conv_plan(plan)}));
        },
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("g"), py::arg("y"),
        py::arg("affine"), py::arg("w"), py::arg("q"), py::arg("q_scale"), py::arg("c"), py::arg("da"),
        py::arg("partials_a"), py::arg("partials_b"), py::arg("c_parts"), py::arg("sizes"), py::arg("dtype"),
        py::arg("stream"), py::arg("width"), py::arg("stride"), py::arg("plan"));

    m.def(
        "gram_raw",
        [](uintptr_t g, uintptr_t x, uintptr_t w, uintptr_t c, uintptr_t da, int c_parts, const GramRawSizes& sizes,
           const ConvInferPlan& plan, const std::string& dtype_name, uintptr_t stream) {
            p3d::GramRaw p{};
            p.shape = gram_raw_shape(sizes);
            p.plan = conv_plan(plan);
            p.dtype = dtype(dtype_name);
            p.g = pointer<const void>(g);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.c = pointer<const float>(c);
            p.c_parts = c_parts;
            p.da = pointer<void>(da);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::gram_raw(p));
        },
        py::arg("g"), py::arg("x"), py::arg("w"), py::arg("c"), py::arg("da"), py::arg("c_parts"), py::arg("sizes"),
        py::arg("plan"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "gram_raw_why_not",
        [](const GramRawSizes& sizes) {
            p3d::ConvInferPlan plan{};
            return p3d::gram_raw_plan(plan, gram_raw_shape(sizes), {});
        },
        py::arg("sizes"));

    m.def(
        "gram_raw_plan",
        [](const GramRawSizes& sizes, const ConvInferTile& wish) {
            p3d::ConvInferPlan plan{};
            check(p3d::gram_raw_plan(plan, gram_raw_shape(sizes), {wish[0], wish[1], wish[2]}));
            return conv_plan(plan);
        },
        py::arg("sizes"), py::arg("wish") = ConvInferTile{});
}

void define_reduce_bwd(Module& m) {
    m.def(
        "reduce_bwd",
        [](uintptr_t g, uintptr_t z, uintptr_t affine, uintptr_t sums, uintptr_t x, uintptr_t w, uintptr_t o,
           uintptr_t o_mask, uintptr_t dx, uintptr_t partials, int64_t positions, int64_t in_channels,
           int64_t out_channels, int64_t height, int64_t width, bool mask_x, const std::string& dtype_name,
           uintptr_t stream) {
            p3d::ReduceBwd p{};
            p.shape = {positions, in_channels, out_channels, height, width};
            p.dtype = dtype(dtype_name);
            p.g = pointer<const void>(g);
            p.z = pointer<const void>(z);
            p.affine = pointer<const float>(affine);
            p.sums = pointer<const float>(sums);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.o = pointer<const void>(o);
            p.o_mask = pointer<const void>(o_mask);
            p.mask_x = mask_x;
            p.dx = pointer<void>(dx);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::reduce_bwd(p));
        },
        py::arg("g"), py::arg("z"), py::arg("affine"), py::arg("sums"), py::arg("x"), py::arg("w"), py::arg("o"),
        py::arg("o_mask"), py::arg("dx"), py::arg("partials"), py::arg("positions"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("height"), py::arg("width"), py::arg("mask_x"), py::arg("dtype"),
        py::arg("stream"));

    m.def(
        "reduce_bwd_why_not",
        [](int64_t positions, int64_t in_channels, int64_t out_channels, int64_t height, int64_t width) {
            return p3d::reduce_bwd_why_not({positions, in_channels, out_channels, height, width});
        },
        py::arg("positions"), py::arg("in_channels"), py::arg("out_channels"), py::arg("height"), py::arg("width"));

    m.def(
        "reduce_bwd_partials",
        [](int64_t positions, int64_t in_channels, int64_t out_channels, int64_t height, int64_t width) {
            return p3d::reduce_bwd_partials({positions, in_channels, out_channels, height, width});
        },
        py::arg("positions"), py::arg("in_channels"), py::arg("out_channels"), py::arg("height"), py::arg("width"));
}

void define_bn_bwd(Module& m) {
    m.def(
        "bn_bwd",
        [](uintptr_t g, uintptr_t mask, uintptr_t z, uintptr_t record, uintptr_t dz, uintptr_t sums, int64_t positions,
           int64_t channels, const std::string& dtype_name, uintptr_t stream) {
            p3d::BnBwd p{};
            p.shape = {positions, channels};
            p.dtype = dtype(dtype_name);
            p.g = pointer<const void>(g);
            p.mask = pointer<const void>(mask);
            p.z = pointer<const void>(z);
            p.record = pointer<const float>(record);
            p.dz = pointer<void>(dz);
            p.sums = pointer<float>(sums);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::bn_bwd(p));
        },
        py::arg("g"), py::arg("mask"), py::arg("z"), py::arg("record"), py::arg("dz"), py::arg("sums"),
        py::arg("positions"), py::arg("channels"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "bn_bwd_why_not",
        [](int64_t positions, int64_t channels) { return p3d::bn_bwd_why_not({positions, channels}); },
        py::arg("positions"), py::arg("channels"));
}

// (N, T, H * W, C)
using TemporalTrainSizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

p3d::TemporalTrainShape temporal_train_shape(const TemporalTrainSizes& sizes) {
    return std::apply([](auto... size) { return p3d::TemporalTrainShape{size...}; }, sizes);
}

void define_temporal_train(Module& m) {
    m.def(
        "temporal_train",
        [](uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t x_sums, uintptr_t w,
           uintptr_t y, uintptr_t partials, const std::string& x_read, bool transposed, const TemporalTrainSizes& sizes,
           const std::string& dtype_name, uintptr_t stream) {
            p3d::TemporalTrain p{};
            p.shape = temporal_train_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.transposed = transposed;
            p.x = operand(read(x_read), x_a, x_b, x_affine_a, x_affine_b, x_sums);
            p.w = pointer<const void>(w);
            p.y = pointer<void>(y);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::temporal_train(p));
        },
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("x_sums"), py::arg("w"),
        py::arg("y"), py::arg("partials"), py::arg("x_read"), py::arg("transposed"), py::arg("sizes"), py::arg("dtype"),
        py::arg("stream"));

    m.def(
        "temporal_train_why_not",
        [](const TemporalTrainSizes& sizes) { return p3d::temporal_train_why_not(temporal_train_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "temporal_train_partials",
        [](const TemporalTrainSizes& sizes) { return p3d::temporal_train_partials(temporal_train_shape(sizes)); },
        py::arg("sizes"));
}

// (N, T, H * W, C, g is added, sums)
using TemporalBwdSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, bool>;

p3d::TemporalBwdShape temporal_bwd_shape(const TemporalBwdSizes& sizes) {
    return std::apply([](auto... size) { return p3d::TemporalBwdShape{size...}; }, sizes);
}

void define_temporal_bwd(Module& m) {
    m.def(
        "temporal_bwd",
        [](uintptr_t dz_a, uintptr_t dz_b, uintptr_t dz_affine_a, uintptr_t dz_affine_b, uintptr_t dz_sums,
           uintptr_t x_a, uintptr_t x_b, uintptr_t x_affine_a, uintptr_t x_affine_b, uintptr_t x_sums, uintptr_t w,
           uintptr_t dx, uintptr_t partials, uintptr_t dw, const std::string& dz_read, const std::string& x_read,
           const TemporalBwdSizes& sizes, const std::string& dtype_name, uintptr_t stream) {
            p3d::TemporalBwd p{};
            p.shape = temporal_bwd_shape(sizes);
            p.dtype = dtype(dtype_name);
            p.dz = operand(read(dz_read), dz_a, dz_b, dz_affine_a, dz_affine_b, dz_sums);
            p.x = operand(read(x_read), x_a, x_b, x_affine_a, x_affine_b, x_sums);
            p.w = pointer<const void>(w);
            p.dx = pointer<void>(dx);
            p.partials = pointer<float>(partials);
            p.dw = pointer<float>(dw);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::temporal_bwd(p));
        },
        py::arg("dz_a"), py::arg("dz_b"), py::arg("dz_affine_a"), py::arg("dz_affine_b"), py::arg("dz_sums"),
        py::arg("x_a"), py::arg("x_b"), py::arg("x_affine_a"), py::arg("x_affine_b"), py::arg("x_sums"), py::arg("w"),
        py::arg("dx"), py::arg("partials"), py::arg("dw"), py::arg("dz_read"), py::arg("x_read"), py::arg("sizes"),
        py::arg("dtype"), py::arg("stream"));

    m.def(
        "temporal_bwd_why_not",
        [](const TemporalBwdSizes& sizes) { return p3d::temporal_bwd_why_not(temporal_bwd_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "temporal_bwd_rows",  // splits of dw, rows of partials
        [](const TemporalBwdSizes& sizes) {
            p3d::TemporalBwdShape shape = temporal_bwd_shape(sizes);
            return std::pair(p3d::temporal_bwd_splits(shape), p3d::temporal_bwd_partials(shape));
        },
        py::arg("sizes"));
}

}  // namespace

void define_training(Module& m) {
    define_conv_wgrad(m);
    define_raw_wgrad(m);
    define_conv_train(m);
    define_conv_pair(m);
    define_conv_raw(m);
    define_point_dgrad(m);
    define_gram(m);
    define_reduce_bwd(m);
    define_bn_bwd(m);
    define_temporal_train(m);
    define_temporal_bwd(m);
}

}  // namespace bindings
