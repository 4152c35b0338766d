// What the bindings share: conversions of arguments, and the module as tapes see it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "p3d.h"
#include "tape.h"

namespace bindings {

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline p3d::DType dtype(const std::string& name) {
    if (name == "bfloat16") return p3d::DType::bf16;
    if (name == "float16") return p3d::DType::fp16;
    throw py::value_error("dtype: expected bfloat16 or float16, got " + name);
}

inline void check(const char* error) {
    if (error) throw std::runtime_error(error);
}

// (rows, columns, splits), and (*tile, box[4], stages, blocks)
using ConvInferTile = std::array<int, 3>;
using ConvInferPlan = std::array<int, 9>;

inline p3d::ConvInferPlan conv_plan(const ConvInferPlan& plan) {
    return {{plan[0], plan[1], plan[2]}, {plan[3], plan[4], plan[5], plan[6]}, plan[7], plan[8]};
}

inline ConvInferPlan conv_plan(const p3d::ConvInferPlan& plan) {
    const auto& [tile, box, stages, blocks] = plan;
    return {tile.rows, tile.columns, tile.splits, box[0], box[1], box[2], box[3], stages, blocks};
}

// ---- Tapes. While one records, a launcher that is called from Python adds itself to it in place of launching: what it
// takes for addresses are numbers of the tape's, and all else is kept as it was converted.

inline thread_local p3d::Tape* recording = nullptr;

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

void define_training(Module& m);  // bindings_train.cpp

}  // namespace bindings
