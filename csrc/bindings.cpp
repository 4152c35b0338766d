// p3d_kernels._C: the launchers of p3d.h for Python. Pointers and streams are ints; an error raises RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "p3d.h"
#include "tape.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

p3d::DType dtype(const std::string& name) {
    if (name == "bfloat16") return p3d::DType::bf16;
    if (name == "float16") return p3d::DType::fp16;
    throw py::value_error("dtype: expected bfloat16 or float16, got " + name);
}

p3d::Join join(const std::string& name) {
    if (name == "relu") return p3d::Join::relu;
    if (name == "relu_add") return p3d::Join::relu_add;
    if (name == "add_relu") return p3d::Join::add_relu;
    if (name == "mean_relu") return p3d::Join::mean_relu;
    if (name == "none") return p3d::Join::none;
    throw py::value_error("join: expected relu, relu_add, add_relu, mean_relu or none, got " + name);
}

p3d::Read read(const std::string& name) {
    static const char* const names[] = {"raw",    "bn_relu", "join_port", "join_b",
                                        "join_c", "masked",  "bn_bwd",    "bn_bwd_open"};
    const auto* found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) throw py::value_error("read: expected one of conv_wgrad's, got " + name);
    return p3d::Read(found - names);
}

// (N, T, H, W, Ci, Co, taps, stride, g on the grid of x, totals, g is x, read of g, read of x)
using ConvWgradSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool, bool, bool,
                                  std::string, std::string>;

p3d::ConvWgradShape conv_wgrad_shape(const ConvWgradSizes& sizes) {
    const auto& [clips, time, height, width, ci, co, taps, stride, strided, totals, same, g_read, x_read] = sizes;
    return {clips, time, height, width, ci, co, taps, stride, strided, totals, same, read(g_read), read(x_read)};
}

// (N, T, H, W, Ci, Co, taps, stride, g on the grid of x), and (rows, splits) of a tile
using RawWgradSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool>;
using RawWgradTile = std::array<int, 2>;

p3d::RawWgradShape raw_wgrad_shape(const RawWgradSizes& sizes) {
    return std::apply([](auto... size) { return p3d::RawWgradShape{size...}; }, sizes);
}

// (N, T, H, W, Ci, Co, taps in time, taps in space, stride in space, joined, H and W of a strided o, To)
using ConvInferSizes =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, bool, int64_t, int64_t, int64_t>;

p3d::ConvInferShape conv_infer_shape(const ConvInferSizes& sizes) {
    return std::apply([](auto... size) { return p3d::ConvInferShape{size...}; }, sizes);
}

// (rows, columns, splits), and (*tile, box[4], stages, blocks)
using ConvInferTile = std::array<int, 3>;
using ConvInferPlan = std::array<int, 9>;

// (N, T, H * W, Ci, Co, taps, transposed, read, loads of the epilogue, sums)
using ConvTrainSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int, bool, std::string, int, bool>;

p3d::ConvTrainShape conv_train_shape(const ConvTrainSizes& sizes) {
    const auto& [clips, time, frame, ci, co, taps, transposed, x_read, loads, sums] = sizes;
    return {clips, time, frame, ci, co, taps, transposed, read(x_read), loads, sums};
}

// (N * T, H, W, M, Co, read, whether there is y, thin)
using GramBwdSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, std::string, bool, bool>;

p3d::GramBwdShape gram_bwd_shape(const GramBwdSizes& sizes) {
    const auto& [frames, height, width, m, co, x_read, masked, thin] = sizes;
    return {frames, height, width, m, co, read(x_read), masked, thin};
}

// (N, T, H * W, C, g is added, sums)
using TemporalBwdSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, bool>;

p3d::TemporalBwdShape temporal_bwd_shape(const TemporalBwdSizes& sizes) {
    return std::apply([](auto... size) { return p3d::TemporalBwdShape{size...}; }, sizes);
}

// (N, T, H * W, C)
using TemporalTrainSizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

p3d::TemporalTrainShape temporal_train_shape(const TemporalTrainSizes& sizes) {
    return std::apply([](auto... size) { return p3d::TemporalTrainShape{size...}; }, sizes);
}

// (N * T * H * W, Ci, Ci of down, Co, read)
using ConvPairSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, std::string>;

p3d::ConvPairShape conv_pair_shape(const ConvPairSizes& sizes) {
    const auto& [positions, ci, down, co, x_read] = sizes;
    return {positions, ci, down, co, read(x_read)};
}

// (W, stride in space, plan) of conv_tiles, which takes the place of conv_train
using ConvTiles = std::optional<std::tuple<int64_t, int, ConvInferPlan>>;

p3d::ConvInferPlan conv_plan(const ConvInferPlan& plan) {
    return {{plan[0], plan[1], plan[2]}, {plan[3], plan[4], plan[5], plan[6]}, plan[7], plan[8]};
}

ConvInferPlan conv_plan(const p3d::ConvInferPlan& plan) {
    const auto& [tile, box, stages, blocks] = plan;
    return {tile.rows, tile.columns, tile.splits, box[0], box[1], box[2], box[3], stages, blocks};
}

// (N, T * H * W, Ci, Co, masks)
using PointDgradSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;

p3d::PointDgradShape point_dgrad_shape(const PointDgradSizes& sizes) {
    return std::apply([](auto... size) { return p3d::PointDgradShape{size...}; }, sizes);
}

// (N, T, H, W, Ci, Co, taps, stride in space, transposed, with an o, with below)
using ConvRawSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool, bool, bool>;

p3d::ConvRawShape conv_raw_shape(const ConvRawSizes& sizes) {
    return std::apply([](auto... size) { return p3d::ConvRawShape{size...}; }, sizes);
}

// (N, T, H, W, M, Co)
using GramRawSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

p3d::GramRawShape gram_raw_shape(const GramRawSizes& sizes) {
    return std::apply([](auto... size) { return p3d::GramRawShape{size...}; }, sizes);
}

p3d::ConvShape conv_shape(int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels) {
    return {frames, height, width, in_channels, out_channels};
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

p3d::PixelType pixel_type(const std::string& name) {
    if (name == "float32") return p3d::PixelType::fp32;
    if (name == "uint8") return p3d::PixelType::uint8;
    return p3d::PixelType(dtype(name));
}

void check(const char* error) {
    if (error) throw std::runtime_error(error);
}

// ---- Tapes. While one records, a launcher that is called from Python adds itself to it in place of launching: what it
// takes for addresses are numbers of the tape's, and all else is kept as it was converted.

thread_local p3d::Tape* recording = nullptr;

using Addresses = std::vector<uintptr_t>;

template <bool kStream, typename T>
decltype(auto) bound(const T& argument, const uint64_t* addresses, CUstream_st* stream) {
    if constexpr (kStream) {
        return reinterpret_cast<uintptr_t>(stream);
    } else if constexpr (std::is_same_v<T, uintptr_t>) {
        return uintptr_t(addresses[argument]);
    } else if constexpr (std::is_same_v<T, Addresses>) {
        Addresses found(argument.size());
        for (size_t i = 0; i < found.size(); ++i) found[i] = addresses[argument[i]];
        return found;
    } else {
        return (argument);
    }
}

// The module; what it defines that takes a stream is a launcher, which tapes can record. The last uintptr_t is the
// stream, the others, alone or in a vector, are addresses.
class Module {
 public:
    explicit Module(py::module_& module) : module_(module) {}

    template <typename Function, typename... Extra>
    void def(const char* name, Function function, const Extra&... extra) {
        define(name, function, &Function::operator(), extra...);
    }

 private:
    template <typename... Arguments>
    static constexpr size_t stream_of() {  // sizeof...(Arguments): there is none
        constexpr bool words[] = {std::is_same_v<Arguments, uintptr_t>..., false};
        size_t found = sizeof...(Arguments);
        for (size_t i = 0; i < sizeof...(Arguments); ++i)
            if (words[i]) found = i;
        return found;
    }

    template <typename Function, typename Result, typename... Arguments, typename... Extra>
    void define(const char* name, Function function, Result (Function::*)(Arguments...) const, const Extra&... extra) {
        constexpr size_t kStream = stream_of<std::decay_t<Arguments>...>();
        if constexpr (kStream < sizeof...(Arguments)) {
            static_assert(std::is_void_v<Result>, "a launcher returns nothing");
            module_.def(
                name,
                [function](Arguments... arguments) {
                    if (!recording) {
                        p3d::need_context();
                        return function(arguments...);
                    }
                    std::tuple<std::decay_t<Arguments>...> kept(arguments...);
                    record<kStream>(function, kept, std::index_sequence_for<Arguments...>());
                },
                extra...);
        } else {
            module_.def(name, function, extra...);
        }
    }

    template <size_t kStream, typename Function, typename Kept, size_t... I>
    static void record(const Function& function, const Kept& kept, std::index_sequence<I...>) {
        (check_number(std::get<I>(kept)), ...);
        recording->add([function, kept](const uint64_t* addresses, CUstream_st* stream) {
            function(bound<I == kStream>(std::get<I>(kept), addresses, stream)...);
        });
    }

    template <typename T>
    static void check_number(const T& argument) {
        if constexpr (std::is_same_v<T, uintptr_t>) recording->check(argument);
        if constexpr (std::is_same_v<T, Addresses>)
            for (uintptr_t number : argument) recording->check(number);
    }

    py::module_& module_;
};

void define_tape(py::module_& module) {
    // (function, grid, (threads, shared, cooperative, dependent), (size, word, whether an address) of each parameter)
    using Shape = std::tuple<unsigned, unsigned, bool, bool>;
    using Parameter = std::tuple<int, uint64_t, bool>;
    py::class_<p3d::Tape>(module, "Tape")
        .def(py::init<size_t, std::vector<std::pair<int, uint64_t>>>(), py::arg("bases"), py::arg("addresses"))
        .def(
            "add_triton",
            [](p3d::Tape& tape, uintptr_t function, const std::array<unsigned, 3>& grid, const Shape& shape,
               const std::vector<Parameter>& parameters) {
                const auto& [threads, shared, cooperative, dependent] = shape;
                p3d::TritonLaunch launch{function, grid, threads, shared, cooperative, dependent, {}};
                for (const auto& [size, word, address] : parameters) launch.parameters.push_back({size, word, address});
                tape.add(std::move(launch));
            },
            py::arg("function"), py::arg("grid"), py::arg("shape"), py::arg("parameters"))
        .def(
            "add",
            [](p3d::Tape& tape, const py::function& launch, const py::args& numbers) {
                size_t steps = tape.steps();
                recording = &tape;
                try {
                    launch(0, *numbers);
                } catch (...) {
                    recording = nullptr;
                    throw;
                }
                recording = nullptr;
                if (tape.steps() != steps + 1) throw std::runtime_error("a plan launched other than one kernel");
            },
            py::arg("launch"))
        .def(
            "run",
            [](p3d::Tape& tape, const std::vector<uint64_t>& bases, int device, uintptr_t stream) {
                tape.run(bases, device, pointer<CUstream_st>(stream));
            },
            py::arg("bases"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("graph_runs", &p3d::Tape::graph_runs);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Hopper kernels (csrc/p3d.h) and tapes of their launches (csrc/tape.h); use p3d_kernels.ops.";
    define_tape(module);
    Module m(module);

    m.def(
        "running_stats",
        [](const Addresses& addresses, const std::vector<std::pair<int, float>>& norms, uintptr_t stream) {
            // of each norm the batch's mean and var, mean, var and count; (channels, momentum)
            if (addresses.size() != 5 * norms.size()) throw py::value_error("addresses: expected five a norm");
            std::vector<p3d::RunningNorm> p(norms.size());
            for (size_t i = 0; i < p.size(); ++i) {
                p[i].batch_mean = pointer<const float>(addresses[5 * i]);
                p[i].batch_var = pointer<const float>(addresses[5 * i + 1]);
                p[i].mean = pointer<float>(addresses[5 * i + 2]);
                p[i].var = pointer<float>(addresses[5 * i + 3]);
                p[i].count = pointer<int64_t>(addresses[5 * i + 4]);
                std::tie(p[i].channels, p[i].momentum) = norms[i];
            }
            check(p3d::running_stats(p.data(), int(p.size()), pointer<CUstream_st>(stream)));
        },
        py::arg("addresses"), py::arg("norms"), py::arg("stream"));

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
        [](int64_t positions, int64_t channels) {
            const char* why = p3d::bn_bwd_why_not({positions, channels});
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("positions"), py::arg("channels"));

    m.def(
        "spatial_conv",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t affine, uintptr_t out_affine, uintptr_t partials,
           int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels,
           const std::string& dtype_name, uintptr_t stream) {
            p3d::SpatialConv p{};
            p.shape = conv_shape(frames, height, width, in_channels, out_channels);
            p.dtype = dtype(dtype_name);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.y = pointer<void>(y);
            p.affine = pointer<const float>(affine);
            p.out_affine = pointer<const float>(out_affine);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::spatial_conv(p));
        },
        py::arg("x"), py::arg("w"), py::arg("y"), py::arg("affine"), py::arg("out_affine"), py::arg("partials"),
        py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("in_channels"), py::arg("out_channels"),
        py::arg("dtype"), py::arg("stream"));

    m.def(
        "spatial_dgrad",
        [](uintptr_t g, uintptr_t z, uintptr_t affine, uintptr_t sums, uintptr_t w, uintptr_t o, uintptr_t below,
           uintptr_t below_affine, uintptr_t dx, uintptr_t partials, int64_t frames, int64_t height, int64_t width,
           int64_t in_channels, int64_t out_channels, const std::string& dtype_name, uintptr_t stream) {
            p3d::SpatialDgrad p{};
            p.shape = conv_shape(frames, height, width, in_channels, out_channels);
            p.dtype = dtype(dtype_name);
            p.g = pointer<const void>(g);
            p.z = pointer<const void>(z);
            p.affine = pointer<const float>(affine);
            p.sums = pointer<const float>(sums);
            p.w = pointer<const void>(w);
            p.o = pointer<const void>(o);
            p.below = pointer<const void>(below);
            p.below_affine = pointer<const float>(below_affine);
            p.dx = pointer<void>(dx);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::spatial_dgrad(p));
        },
        py::arg("g"), py::arg("z"), py::arg("affine"), py::arg("sums"), py::arg("w"), py::arg("o"), py::arg("below"),
        py::arg("below_affine"), py::arg("dx"), py::arg("partials"), py::arg("frames"), py::arg("height"),
        py::arg("width"), py::arg("in_channels"), py::arg("out_channels"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "spatial_wgrad",
        [](uintptr_t g, uintptr_t z, uintptr_t affine, uintptr_t sums, uintptr_t a, uintptr_t a_affine,
           uintptr_t partials, uintptr_t finished, int64_t frames, int64_t height, int64_t width, int64_t in_channels,
           int64_t out_channels, const std::string& dtype_name, uintptr_t stream) {
            p3d::SpatialWgrad p{};
            p.shape = conv_shape(frames, height, width, in_channels, out_channels);
            p.dtype = dtype(dtype_name);
            p.g = pointer<const void>(g);
            p.z = pointer<const void>(z);
            p.affine = pointer<const float>(affine);
            p.sums = pointer<const float>(sums);
            p.a = pointer<const void>(a);
            p.a_affine = pointer<const float>(a_affine);
            p.partials = pointer<float>(partials);
            p.finished = pointer<void>(finished);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::spatial_wgrad(p));
        },
        py::arg("g"), py::arg("z"), py::arg("affine"), py::arg("sums"), py::arg("a"), py::arg("a_affine"),
        py::arg("partials"), py::arg("finished"), py::arg("frames"), py::arg("height"), py::arg("width"),
        py::arg("in_channels"), py::arg("out_channels"), py::arg("dtype"), py::arg("stream"));

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
        [](const ConvWgradSizes& sizes) {
            const char* why = p3d::conv_wgrad_why_not(conv_wgrad_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

    m.def(
        "conv_wgrad_partials",
        [](const ConvWgradSizes& sizes) { return p3d::conv_wgrad_partials(conv_wgrad_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "raw_wgrad",
        [](const Addresses& addresses, const std::vector<RawWgradSizes>& sizes, const std::vector<RawWgradTile>& tiles,
           int blocks, const std::string& dtype_name, uintptr_t stream) {  // of each g, x, partials; (rows, splits)
            if (addresses.size() != 3 * sizes.size() || tiles.size() != sizes.size())
                throw py::value_error("addresses, tiles: expected three and one of each size");
            std::vector<p3d::RawWgrad> p(sizes.size());
            for (size_t i = 0; i < p.size(); ++i)
                p[i] = {raw_wgrad_shape(sizes[i]),
                        {tiles[i][0], tiles[i][1]},
                        pointer<const void>(addresses[3 * i]),
                        pointer<const void>(addresses[3 * i + 1]),
                        pointer<float>(addresses[3 * i + 2])};
            check(p3d::raw_wgrad(p.data(), int(p.size()), blocks, dtype(dtype_name), pointer<CUstream_st>(stream)));
        },
        py::arg("addresses"), py::arg("sizes"), py::arg("tiles"), py::arg("blocks"), py::arg("dtype"),
        py::arg("stream"));

    m.def(
        "raw_wgrad_plan",
        [](const std::vector<RawWgradSizes>& sizes, const std::vector<RawWgradTile>& tiles, int blocks) {
            if (tiles.size() != sizes.size()) throw py::value_error("tiles: expected one of each size");
            std::vector<p3d::RawWgradShape> shapes;
            std::vector<p3d::RawWgradTile> plan;
            for (const auto& size : sizes) shapes.push_back(raw_wgrad_shape(size));
            for (const auto& [rows, splits] : tiles) plan.push_back({rows, splits});
            check(p3d::raw_wgrad_plan(plan.data(), blocks, shapes.data(), int(shapes.size())));
            std::vector<RawWgradTile> found;
            for (const auto& tile : plan) found.push_back({tile.rows, tile.splits});
            return std::make_pair(found, blocks);
        },
        py::arg("sizes"), py::arg("tiles"), py::arg("blocks"));

    m.def(
        "raw_wgrad_why_not",
        [](const RawWgradSizes& sizes) {
            const char* why = p3d::raw_wgrad_why_not(raw_wgrad_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

    m.def(
        "conv_infer",
        [](uintptr_t x, uintptr_t o, uintptr_t w, uintptr_t affine, uintptr_t y, const ConvInferSizes& sizes,
           const ConvInferPlan& plan, const std::string& join_name, const std::string& dtype_name, uintptr_t stream) {
            p3d::ConvInfer p{};
            p.shape = conv_infer_shape(sizes);
            p.plan = conv_plan(plan);
            p.dtype = dtype(dtype_name);
            p.join = join(join_name);
            p.x = pointer<const void>(x);
            p.o = pointer<const void>(o);
            p.w = pointer<const void>(w);
            p.affine = pointer<const float>(affine);
            p.y = pointer<void>(y);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::conv_infer(p));
        },
        py::arg("x"), py::arg("o"), py::arg("w"), py::arg("affine"), py::arg("y"), py::arg("sizes"), py::arg("plan"),
        py::arg("join"), py::arg("dtype"), py::arg("stream"));

    m.def(
        "conv_infer_why_not",
        [](const ConvInferSizes& sizes) {
            p3d::ConvInferPlan plan{};
            const char* why = p3d::conv_infer_plan(plan, conv_infer_shape(sizes), {});
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

    m.def(
        "conv_infer_plan",
        [](const ConvInferSizes& sizes, const ConvInferTile& wish) {
            p3d::ConvInferPlan plan{};
            check(p3d::conv_infer_plan(plan, conv_infer_shape(sizes), {wish[0], wish[1], wish[2]}));
            return conv_plan(plan);
        },
        py::arg("sizes"), py::arg("wish") = ConvInferTile{});

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
        "conv_pair_why_not",
        [](const ConvPairSizes& sizes) {
            const char* why = p3d::conv_pair_why_not(conv_pair_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

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
        "gram_bwd_why_not",
        [](const GramBwdSizes& sizes) {
            const char* why = p3d::gram_bwd_why_not(gram_bwd_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
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
        "conv_train_why_not",
        [](const ConvTrainSizes& sizes) {
            const char* why = p3d::conv_train_why_not(conv_train_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

    m.def(
        "conv_train_partials",
        [](const ConvTrainSizes& sizes) { return p3d::conv_train_partials(conv_train_shape(sizes)); },
        py::arg("sizes"));

    m.def(
        "conv_tiles_why_not",
        [](const ConvTrainSizes& sizes, int64_t width, int stride, bool gram) {
            p3d::ConvInferPlan plan{};
            const char* why = p3d::conv_tiles_plan(plan, {conv_train_shape(sizes), width, stride, gram}, {});
            return why ? std::optional<std::string>(why) : std::nullopt;
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
            const char* why = p3d::point_dgrad_plan(plan, point_dgrad_shape(sizes), {});
            return why ? std::optional<std::string>(why) : std::nullopt;
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
            const char* why = p3d::gram_raw_plan(plan, gram_raw_shape(sizes), {});
            return why ? std::optional<std::string>(why) : std::nullopt;
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
            const char* why = p3d::reduce_bwd_why_not({positions, in_channels, out_channels, height, width});
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("positions"), py::arg("in_channels"), py::arg("out_channels"), py::arg("height"), py::arg("width"));

    m.def(
        "reduce_bwd_partials",
        [](int64_t positions, int64_t in_channels, int64_t out_channels, int64_t height, int64_t width) {
            return p3d::reduce_bwd_partials({positions, in_channels, out_channels, height, width});
        },
        py::arg("positions"), py::arg("in_channels"), py::arg("out_channels"), py::arg("height"), py::arg("width"));

    m.def(
        "stem_infer",
        [](uintptr_t x, uintptr_t w, uintptr_t affine, uintptr_t y, int64_t clips, int64_t channels, int64_t frames,
           int64_t height, int64_t width, const std::array<int64_t, 5>& strides, const std::string& x_type,
           const std::string& dtype_name, bool padded, const std::vector<float>& pixel_scale,
           const std::vector<float>& pixel_bias, uintptr_t stream) {
            p3d::StemInfer p{};
            p.shape = {clips, channels, frames, height, width, padded};
            std::copy(strides.begin(), strides.end(), p.strides);
            p.x_type = pixel_type(x_type);
            p.dtype = dtype(dtype_name);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.affine = pointer<const float>(affine);
            p.y = pointer<void>(y);
            std::copy_n(pixel_scale.begin(), std::min<size_t>(pixel_scale.size(), 4), p.pixel_scale);
            std::copy_n(pixel_bias.begin(), std::min<size_t>(pixel_bias.size(), 4), p.pixel_bias);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::stem_infer(p));
        },
        py::arg("x"), py::arg("w"), py::arg("affine"), py::arg("y"), py::arg("clips"), py::arg("channels"),
        py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("strides"), py::arg("x_type"), py::arg("dtype"),
        py::arg("padded"), py::arg("pixel_scale"), py::arg("pixel_bias"), py::arg("stream"));

    m.def(
        "stem_fwd",
        [](uintptr_t x, uintptr_t w, uintptr_t gamma, uintptr_t pooled, uintptr_t tap, uintptr_t partials,
           int64_t clips, int64_t channels, int64_t frames, int64_t height, int64_t width, bool padded,
           const std::array<int64_t, 5>& strides, const std::string& x_type, const std::string& w_type,
           const std::string& gamma_type, const std::string& dtype_name, uintptr_t stream) {
            p3d::StemFwd p{};
            p.shape = {clips, channels, frames, height, width, padded};
            std::copy(strides.begin(), strides.end(), p.strides);
            p.x_type = pixel_type(x_type);
            p.w_type = pixel_type(w_type);
            p.gamma_type = pixel_type(gamma_type);
            p.dtype = dtype(dtype_name);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.gamma = pointer<const void>(gamma);
            p.pooled = pointer<void>(pooled);
            p.tap = pointer<void>(tap);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::stem_fwd(p));
        },
        py::arg("x"), py::arg("w"), py::arg("gamma"), py::arg("pooled"), py::arg("tap"), py::arg("partials"),
        py::arg("clips"), py::arg("channels"), py::arg("frames"), py::arg("height"), py::arg("width"),
        py::arg("padded"), py::arg("strides"), py::arg("x_type"), py::arg("w_type"), py::arg("gamma_type"),
        py::arg("dtype"), py::arg("stream"));

    m.def(
        "stem_relu",
        [](uintptr_t pooled, uintptr_t record, uintptr_t y, uintptr_t tap, uintptr_t x, uintptr_t w, uintptr_t gamma,
           int64_t clips, int64_t channels, int64_t frames, int64_t height, int64_t width, bool padded,
           const std::array<int64_t, 5>& strides, const std::string& x_type, const std::string& w_type,
           const std::string& gamma_type, const std::string& dtype_name, uintptr_t stream) {
            p3d::StemRelu p{};
            p.shape = {clips, channels, frames, height, width, padded};
            std::copy(strides.begin(), strides.end(), p.strides);
            p.x_type = pixel_type(x_type);
            p.w_type = pixel_type(w_type);
            p.gamma_type = pixel_type(gamma_type);
            p.dtype = dtype(dtype_name);
            p.pooled = pointer<void>(pooled);
            p.record = pointer<const float>(record);
            p.y = pointer<void>(y);
            p.tap = pointer<void>(tap);
            p.x = pointer<const void>(x);
            p.w = pointer<const void>(w);
            p.gamma = pointer<const void>(gamma);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::stem_relu(p));
        },
        py::arg("pooled"), py::arg("record"), py::arg("y"), py::arg("tap"), py::arg("x"), py::arg("w"),
        py::arg("gamma"), py::arg("clips"), py::arg("channels"), py::arg("frames"), py::arg("height"), py::arg("width"),
        py::arg("padded"), py::arg("strides"), py::arg("x_type"), py::arg("w_type"), py::arg("gamma_type"),
        py::arg("dtype"), py::arg("stream"));

    m.def(
        "stem_wgrad",
        [](uintptr_t x, uintptr_t g, uintptr_t tap, uintptr_t w, uintptr_t record, uintptr_t sums, uintptr_t partials,
           int64_t clips, int64_t channels, int64_t frames, int64_t height, int64_t width, bool padded,
           const std::array<int64_t, 5>& strides, const std::string& x_type, const std::string& w_type,
           const std::string& dtype_name, uintptr_t stream) {
            p3d::StemWgrad p{};
            p.shape = {clips, channels, frames, height, width, padded};
            std::copy(strides.begin(), strides.end(), p.strides);
            p.x_type = pixel_type(x_type);
            p.w_type = pixel_type(w_type);
            p.dtype = dtype(dtype_name);
            p.x = pointer<const void>(x);
            p.g = pointer<const void>(g);
            p.tap = pointer<const void>(tap);
            p.w = pointer<const void>(w);
            p.record = pointer<const float>(record);
            p.sums = pointer<const float>(sums);
            p.partials = pointer<float>(partials);
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::stem_wgrad(p));
        },
        py::arg("x"), py::arg("g"), py::arg("tap"), py::arg("w"), py::arg("record"), py::arg("sums"),
        py::arg("partials"), py::arg("clips"), py::arg("channels"), py::arg("frames"), py::arg("height"),
        py::arg("width"), py::arg("padded"), py::arg("strides"), py::arg("x_type"), py::arg("w_type"), py::arg("dtype"),
        py::arg("stream"));

    auto stem_reason = [&](const char* name, const char* (*why_not)(const p3d::StemShape&)) {
        m.def(
            name,
            [why_not](int64_t clips, int64_t channels, int64_t frames, int64_t height, int64_t width, bool padded) {
                const char* why = why_not({clips, channels, frames, height, width, padded});
                return why ? std::optional<std::string>(why) : std::nullopt;
            },
            py::arg("clips"), py::arg("channels"), py::arg("frames"), py::arg("height"), py::arg("width"),
            py::arg("padded"));
    };
    stem_reason("stem_infer_why_not", p3d::stem_infer_why_not);
    stem_reason("stem_fwd_why_not", p3d::stem_fwd_why_not);
    stem_reason("stem_wgrad_why_not", p3d::stem_wgrad_why_not);

    auto stem_partials = [&](const char* name, int (*partials)(const p3d::StemShape&)) {
        m.def(
            name,
            [partials](int64_t clips, int64_t channels, int64_t frames, int64_t height, int64_t width, bool padded) {
                return partials({clips, channels, frames, height, width, padded});
            },
            py::arg("clips"), py::arg("channels"), py::arg("frames"), py::arg("height"), py::arg("width"),
            py::arg("padded"));
    };
    stem_partials("stem_fwd_partials", p3d::stem_fwd_partials);
    stem_partials("stem_wgrad_partials", p3d::stem_wgrad_partials);

    auto reason = [&](const char* name, const char* (*why_not)(const p3d::ConvShape&)) {
        m.def(
            name,
            [why_not](int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels) {
                const char* why = why_not(conv_shape(frames, height, width, in_channels, out_channels));
                return why ? std::optional<std::string>(why) : std::nullopt;
            },
            py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("in_channels"), py::arg("out_channels"));
    };
    reason("spatial_conv_why_not", p3d::spatial_conv_why_not);
    reason("spatial_wgrad_why_not", p3d::spatial_wgrad_why_not);

    auto rows = [&](const char* name, int (*partials)(const p3d::ConvShape&)) {
        m.def(
            name,
            [partials](int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels) {
                return partials(conv_shape(frames, height, width, in_channels, out_channels));
            },
            py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("in_channels"), py::arg("out_channels"));
    };
    rows("spatial_conv_partials", p3d::spatial_conv_partials);
    rows("spatial_wgrad_partials", p3d::spatial_wgrad_partials);
    m.def(
        "spatial_dgrad_partials",
        [](int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels, bool finished) {
            return p3d::spatial_dgrad_partials(conv_shape(frames, height, width, in_channels, out_channels), finished);
        },
        py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("in_channels"), py::arg("out_channels"),
        py::arg("finished"));

    m.def(
        "tail_infer",
        [](uintptr_t x, uintptr_t o, uintptr_t r, uintptr_t w_t, uintptr_t w_e, uintptr_t w_r, uintptr_t w_d,
           uintptr_t affine_t, uintptr_t affine_e, uintptr_t affine_r, uintptr_t affine_d, uintptr_t y, uintptr_t z,
           int64_t clips, int64_t time, int64_t frame, int64_t channels, int64_t down_channels, int64_t pooled_time,
           const std::string& join_name, const std::string& dtype_name, int64_t thin_width, uintptr_t stream) {
            p3d::TailInfer p{};
            p.shape = {clips, time, frame, channels, down_channels, pooled_time};
            p.dtype = dtype(dtype_name);
            p.join = join(join_name);
            p.x = pointer<const void>(x);
            p.o = pointer<const void>(o);
            p.r = pointer<const void>(r);
            p.w_t = pointer<const void>(w_t);
            p.w_e = pointer<const void>(w_e);
            p.w_r = pointer<const void>(w_r);
            p.w_d = pointer<const void>(w_d);
            p.affine_t = pointer<const float>(affine_t);
            p.affine_e = pointer<const float>(affine_e);
            p.affine_r = pointer<const float>(affine_r);
            p.affine_d = pointer<const float>(affine_d);
            p.y = pointer<void>(y);
            p.z = pointer<void>(z);
            p.thin_width = thin_width;
            p.stream = pointer<CUstream_st>(stream);
            check(p3d::tail_infer(p));
        },
        py::arg("x"), py::arg("o"), py::arg("r"), py::arg("w_t"), py::arg("w_e"), py::arg("w_r"), py::arg("w_d"),
        py::arg("affine_t"), py::arg("affine_e"), py::arg("affine_r"), py::arg("affine_d"), py::arg("y"), py::arg("z"),
        py::arg("clips"), py::arg("time"), py::arg("frame"), py::arg("channels"), py::arg("down_channels"),
        py::arg("pooled_time"), py::arg("join"), py::arg("dtype"), py::arg("thin_width"), py::arg("stream"));

    m.def(
        "tail_infer_why_not",
        [](int64_t clips, int64_t time, int64_t frame, int64_t channels, int64_t down_channels, int64_t pooled_time) {
            const char* why = p3d::tail_infer_why_not({clips, time, frame, channels, down_channels, pooled_time});
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("clips"), py::arg("time"), py::arg("frame"), py::arg("channels"), py::arg("down_channels"),
        py::arg("pooled_time"));

    auto temporal = [&](const char* name, auto launch) {
        m.def(
            name,
            [launch](uintptr_t x, uintptr_t o, uintptr_t w, uintptr_t affine, uintptr_t y, int64_t clips, int64_t time,
                     int64_t frame, int64_t channels, const std::string& join_name, const std::string& dtype_name,
                     uintptr_t stream) {
                p3d::TemporalInfer p{};
                p.shape = {clips, time, frame, channels};
                p.dtype = dtype(dtype_name);
                p.join = join(join_name);
                p.x = pointer<const void>(x);
                p.o = pointer<const void>(o);
                p.w = pointer<const void>(w);
                p.affine = pointer<const float>(affine);
                p.y = pointer<void>(y);
                p.stream = pointer<CUstream_st>(stream);
                check(launch(p));
            },
            py::arg("x"), py::arg("o"), py::arg("w"), py::arg("affine"), py::arg("y"), py::arg("clips"),
            py::arg("time"), py::arg("frame"), py::arg("channels"), py::arg("join"), py::arg("dtype"),
            py::arg("stream"));
    };
    temporal("temporal_infer", p3d::temporal_infer);
    temporal("temporal_boxes", p3d::temporal_boxes);

    auto temporal_reason = [&](const char* name, auto why_not) {
        m.def(
            name,
            [why_not](int64_t clips, int64_t time, int64_t frame, int64_t channels) {
                const char* why = why_not({clips, time, frame, channels});
                return why ? std::optional<std::string>(why) : std::nullopt;
            },
            py::arg("clips"), py::arg("time"), py::arg("frame"), py::arg("channels"));
    };
    temporal_reason("temporal_infer_why_not", p3d::temporal_infer_why_not);
    temporal_reason("temporal_boxes_why_not", p3d::temporal_boxes_why_not);

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
        [](const TemporalTrainSizes& sizes) {
            const char* why = p3d::temporal_train_why_not(temporal_train_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

    m.def(
        "temporal_train_partials",
        [](const TemporalTrainSizes& sizes) { return p3d::temporal_train_partials(temporal_train_shape(sizes)); },
        py::arg("sizes"));

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
        [](const TemporalBwdSizes& sizes) {
            const char* why = p3d::temporal_bwd_why_not(temporal_bwd_shape(sizes));
            return why ? std::optional<std::string>(why) : std::nullopt;
        },
        py::arg("sizes"));

    m.def(
        "temporal_bwd_rows",  // splits of dw, rows of partials
        [](const TemporalBwdSizes& sizes) {
            p3d::TemporalBwdShape shape = temporal_bwd_shape(sizes);
            return std::pair(p3d::temporal_bwd_splits(shape), p3d::temporal_bwd_partials(shape));
        },
        py::arg("sizes"));
}
