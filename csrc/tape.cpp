// Tape (tape.h), and the launch of a Triton kernel through the driver, which is looked up at run time.
#include "tape.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>

namespace p3d {

namespace {

constexpr size_t kMostParameters = 128;

// A graph costs some runs of its launches to make, and memory.
constexpr size_t kLeastSteps = 8;    // of a tape that is worth one
constexpr size_t kSeen = 3;          // runs with equal bases before it is made
constexpr size_t kReplays = 4;       // bases that a tape remembers
constexpr size_t kRunsACapture = 8;  // by graph, on average, or no more are made once every place had one

template <typename Function>
Function driver_function(const char* name, unsigned version) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<Function>(function);
}

struct Driver {  // of functions that are missing, nullptr
    CUresult (*launch)(const CUlaunchConfig*, CUfunction, void**, void**);
    CUresult (*parameter)(CUfunction, size_t, size_t*, size_t*);
    CUresult (*context)(CUcontext*);
    CUresult (*error)(CUresult, const char**);
};

const Driver& driver() {
    static const Driver functions = {
        driver_function<decltype(Driver::launch)>("cuLaunchKernelEx", 11060),
        driver_function<decltype(Driver::parameter)>("cuFuncGetParamInfo", 12040),
        driver_function<decltype(Driver::context)>("cuCtxGetCurrent", 4000),
        driver_function<decltype(Driver::error)>("cuGetErrorString", 6000),
    };
    return functions;
}

void check_parameters(const TritonLaunch& launch) {
    if (!driver().launch || !driver().parameter || !driver().context || !driver().error)
        throw std::runtime_error("the driver has no cuLaunchKernelEx or cuFuncGetParamInfo (needs CUDA 12.4)");
    if (launch.parameters.size() > kMostParameters) throw std::runtime_error("a kernel of too many parameters");
    auto function = reinterpret_cast<CUfunction>(launch.function);
    for (size_t i = 0; i <= launch.parameters.size(); ++i) {
        size_t offset = 0, size = 0;
        bool there = driver().parameter(function, i, &offset, &size) == CUDA_SUCCESS;
        bool expected = i < launch.parameters.size();
        if (there != expected || (there && size != size_t(launch.parameters[i].size)))
            throw std::runtime_error("parameter " + std::to_string(i) + " of a Triton kernel has " +
                                     std::to_string(there ? size : 0) + " bytes, expected " +
                                     std::to_string(expected ? launch.parameters[i].size : 0));
    }
}

void launch_triton(const TritonLaunch& launch, const uint64_t* addresses, CUstream_st* stream) {
    uint64_t words[kMostParameters];
    void* parameters[kMostParameters];
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
        const auto& parameter = launch.parameters[i];
        words[i] = parameter.address ? addresses[parameter.word] : parameter.word;
        parameters[i] = &words[i];
    }
    CUlaunchAttribute attributes[2]{};
    CUlaunchConfig config{};
    config.gridDimX = launch.grid[0], config.gridDimY = launch.grid[1], config.gridDimZ = launch.grid[2];
    config.blockDimX = launch.threads, config.blockDimY = 1, config.blockDimZ = 1;
    config.sharedMemBytes = launch.shared;
    config.hStream = stream;
    config.attrs = attributes;
    if (launch.dependent) {
        auto& attribute = attributes[config.numAttrs++];
        attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cooperative) {
        auto& attribute = attributes[config.numAttrs++];
        attribute.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        attribute.value.cooperative = 1;
    }
    CUresult result = driver().launch(&config, reinterpret_cast<CUfunction>(launch.function), parameters, nullptr);
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    driver().error(result, &text);
    throw std::runtime_error(std::string("a Triton kernel was not launched: ") + (text ? text : "unknown error"));
}

}  // namespace

void need_context(int device) {
    CUcontext context = nullptr;
    if (driver().context && (driver().context(&context) != CUDA_SUCCESS || context)) return;
    if (device < 0 && cudaGetDevice(&device) != cudaSuccess) return;  // which the launch will say
    cudaSetDevice(device);
}

Tape::Tape(size_t bases, std::vector<std::pair<int, uint64_t>> addresses)
    : bases_(bases), addresses_(std::move(addresses)) {
    for (const auto& [base, offset] : addresses_)
        if (base >= 0 && size_t(base) >= bases_) throw std::out_of_range("an address from a base that is not there");
}

void Tape::add(Step step) { steps_.push_back(std::move(step)); }

void Tape::add(TritonLaunch launch) {
    check_parameters(launch);
    for (const auto& parameter : launch.parameters)
        if (parameter.address) check(parameter.word);
    if (launch.grid[0] && launch.grid[1] && launch.grid[2])
        add([launch = std::move(launch)](const uint64_t* addresses, CUstream_st* stream) {
            launch_triton(launch, addresses, stream);
        });
}

void Tape::check(uint64_t number) const {
    if (number >= addresses_.size()) throw std::out_of_range("a launch of an address that the tape does not have");
}

void Tape::run(const std::vector<uint64_t>& bases, int device, CUstream_st* stream) {
    if (bases.size() != bases_) throw std::out_of_range("a run of other bases than the tape has");
    need_context(device);
    if (steps_.size() >= kLeastSteps) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (CUgraphExec_st* graph = graph_for(bases, stream)) {
            cudaError_t error = cudaGraphLaunch(graph, stream);
            if (error != cudaSuccess)
                throw std::runtime_error(std::string("a graph was not launched: ") + cudaGetErrorString(error));
            ++graph_runs_;
            return;
        }
    }
    launch(bases, stream);
}

void Tape::launch(const std::vector<uint64_t>& bases, CUstream_st* stream) const {
    std::vector<uint64_t> addresses;
    addresses.reserve(addresses_.size());
    for (const auto& [base, offset] : addresses_) addresses.push_back(base < 0 ? 0 : bases[base] + offset);
    for (const auto& step : steps_) step(addresses.data(), stream);
}

// The graph of a run with these bases, or nullptr where there is none, or not yet.
CUgraphExec_st* Tape::graph_for(const std::vector<uint64_t>& bases, CUstream_st* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) cudaGetLastError();
    if (status != cudaStreamCaptureStatusNone) return nullptr;  // whose capture it is has the launches themselves
    ++runs_;
    auto found = std::find_if(replays_.begin(), replays_.end(), [&](const Replay& r) { return r.bases == bases; });
    if (found == replays_.end()) {
        if (replays_.size() == kReplays) {
            found = std::min_element(replays_.begin(), replays_.end(),
                                     [](const Replay& a, const Replay& b) { return a.last < b.last; });
            if (found->graph) cudaGraphExecDestroy(found->graph);  // what is still running is freed when it has ended
            replays_.erase(found);
        }
        replays_.push_back({bases, nullptr, 0, 0});
        found = replays_.end() - 1;
    }
    found->last = runs_;
    bool pays = captures_ < kReplays || graph_runs_ >= kRunsACapture * captures_;
    if (++found->seen >= kSeen && !found->graph && pays) {
        ++captures_;
        found->graph = captured(bases);
    }
    return found->graph;
}

// nullptr where the launches cannot be captured.
CUgraphExec_st* Tape::captured(const std::vector<uint64_t>& bases) const {
    // Relaxed: a capture of another thread's that is under way stays valid, whatever this one calls.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaStream_t side = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    if (cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking) == cudaSuccess) {
        if (cudaStreamBeginCapture(side, cudaStreamCaptureModeRelaxed) == cudaSuccess) {
            bool whole = true;
            try {
                launch(bases, side);
            } catch (...) {
                whole = false;  // launched by itself it says why
            }
            if (cudaStreamEndCapture(side, &graph) == cudaSuccess && whole)
                cudaGraphInstantiateWithFlags(&executable, graph, 0);
            if (graph) cudaGraphDestroy(graph);
        }
        cudaStreamDestroy(side);
    }
    cudaGetLastError();
    cudaThreadExchangeStreamCaptureMode(&mode);
    return executable;
}

Tape::~Tape() {
    for (const Replay& replay : replays_)
        if (replay.graph) cudaGraphExecDestroy(replay.graph);
}

}  // namespace p3d
