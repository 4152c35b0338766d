// A pass of a fused op in one call: launches recorded with their addresses left open (p3d_kernels/ops/_tape.py).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

struct CUgraphExec_st;
struct CUstream_st;

namespace p3d {

// A Triton kernel's launch with everything settled but its addresses, in the terms of Triton's own launcher.
struct TritonLaunch {
    struct Parameter {
        int size;       // bytes
        uint64_t word;  // its value in the low bytes, or the number of an address
        bool address;
    };
    uintptr_t function;  // CUfunction
    std::array<unsigned, 3> grid;
    unsigned threads, shared;
    bool cooperative, dependent;
    std::vector<Parameter> parameters;  // all that the kernel has
};

// Makes a device's context current in a thread that has launched nothing yet and has none: the driver's own functions
// need one. -1: the device that the runtime would take.
void need_context(int device = -1);

// Runs its launches one by one or, where it meets the same base addresses again and again, as those of a training loop
// are, as a CUDA graph of them: one launch costs the host what a kernel does.
class Tape {
 public:
    // Launches with the addresses that a run has; throws std::runtime_error where that fails.
    using Step = std::function<void(const uint64_t* addresses, CUstream_st* stream)>;

    // Of a run with `bases` base addresses; address i of a step is base + offset of addresses[i], or 0 where base < 0.
    Tape(size_t bases, std::vector<std::pair<int, uint64_t>> addresses);
    ~Tape();
    Tape(const Tape&) = delete;
    Tape& operator=(const Tape&) = delete;

    void add(Step step);
    void add(TritonLaunch launch);  // throws std::runtime_error unless the kernel takes exactly these parameters
    size_t steps() const { return steps_.size(); }
    void check(uint64_t number) const;  // throws std::out_of_range unless a step may use this number for an address

    // Launches everything on `device`, the current one, until a step throws. Threads may run one tape at a time.
    void run(const std::vector<uint64_t>& bases, int device, CUstream_st* stream);
    size_t graph_runs() const { return graph_runs_; }  // of all runs, those that were one launch of a graph

 private:
    struct Replay {  // of runs with these bases
        std::vector<uint64_t> bases;
        CUgraphExec_st* graph;  // nullptr before it pays
        size_t seen, last;      // runs of its own; the number of the last among all
    };

    void launch(const std::vector<uint64_t>& bases, CUstream_st* stream) const;
    CUgraphExec_st* graph_for(const std::vector<uint64_t>& bases, CUstream_st* stream);
    CUgraphExec_st* captured(const std::vector<uint64_t>& bases) const;

    size_t bases_;
    std::vector<std::pair<int, uint64_t>> addresses_;
    std::vector<Step> steps_;
    std::mutex mutex_;  // of what follows
    std::vector<Replay> replays_;
    size_t runs_ = 0, graph_runs_ = 0, captures_ = 0;
};

}  // namespace p3d
