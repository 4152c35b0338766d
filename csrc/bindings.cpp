// p3d_kernels._C: the launchers of p3d.h for Python. Pointers and streams are ints; an error raises RuntimeError.
// Here are tapes and the families of kernels that inference has; those of training alone are in bindings_train.cpp.
#include "bindings.h"

#include <algorithm>

namespace bindings {
namespace {

p3d::Join join(const std::string& name) {
    if (name == "relu") return p3d::Join::relu;
    if (name == "relu_add") return p3d::Join::relu_add;
    if (name == "add_relu") return p3d::Join::add_relu;
    if (name == "mean_relu") return p3d::Join::mean_relu;
    if (name == "none") return p3d::Join::none;
    throw py::value_error("join: expected relu, relu_add, add_relu, mean_relu or none, got " + name);
}

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

void define_running_stats(Module& m) {
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
}

p3d::ConvShape conv_shape(int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels) {
    return {frames, height, width, in_channels, out_channels};
}

void define_spatial(Module& m) {
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

    auto reason = [&](const char* name, const char* (*why_not)(const p3d::ConvShape&)) {
        m.def(
            name,
            [why_not](int64_t frames, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels) {
                return why_not(conv_shape(frames, height, width, in_channels, out_channels));
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
}

// (N, T, H, W, Ci, Co, taps in time, taps in space, stride in space, joined, H and W of a strided o, To)
using ConvInferSizes =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, bool, int64_t, int64_t, int64_t>;

p3d::ConvInferShape conv_infer_shape(const ConvInferSizes& sizes) {
    return std::apply([](auto... size) { return p3d::ConvInferShape{size...}; }, sizes);
}

void define_conv_infer(Module& m) {
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
            return p3d::conv_infer_plan(plan, conv_infer_shape(sizes), {});
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
}

void define_tail(Module& m) {
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
            return p3d::tail_infer_why_not({clips, time, frame, channels, down_channels, pooled_time});
        },
        py::arg("clips"), py::arg("time"), py::arg("frame"), py::arg("channels"), py::arg("down_channels"),
        py::arg("pooled_time"));
}

void define_temporal_infer(Module& m) {
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
                return why_not({clips, time, frame, channels});
            },
            py::arg("clips"), py::arg("time"), py::arg("frame"), py::arg("channels"));
    };
    temporal_reason("temporal_infer_why_not", p3d::temporal_infer_why_not);
    temporal_reason("temporal_boxes_why_not", p3d::temporal_boxes_why_not);
}

p3d::PixelType pixel_type(const std::string& name) {
    if (name == "float32") return p3d::PixelType::fp32;
    if (name == "uint8") return p3d::PixelType::uint8;
    return p3d::PixelType(dtype(name));
}

void define_stem(Module& m) {
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
                return why_not({clips, channels, frames, height, width, padded});
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
}

}  // namespace
}  // namespace bindings

PYBIND11_MODULE(_C, module) {
    module.doc() = "Hopper kernels (csrc/p3d.h) and tapes of their launches (csrc/tape.h); use p3d_kernels.ops.";
    bindings::define_tape(module);
    bindings::Module m(module);
    bindings::define_running_stats(m);
    bindings::define_spatial(m);
    bindings::define_conv_infer(m);
    bindings::define_tail(m);
    bindings::define_temporal_infer(m);
    bindings::define_stem(m);
    bindings::define_training(m);
}
