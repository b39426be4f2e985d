// Threads of a block, one after the other: each is a fiber that runs until it waits.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fusedformer::cuda::emulator {

// What a fiber waits for, for people: a format with two numbers.
struct Reason {
    const char* format;
    long first, second;
};

class Fibers {
  public:
    explicit Fibers(int most);
    ~Fibers();
    Fibers(const Fibers&) = delete;

    // Runs `body` on fibers 0..count-1 to their ends, or until one fails or none can go on; the error, or "". With a
    // seed other than 0 in an order drawn from it, otherwise by number.
    std::string run(int count, uint64_t seed, const std::function<void()>& body);

    // Within a fiber: its number; to let others run until `ready()`; to give up.
    int current() const { return current_; }
    template <typename Ready>
    void wait_until(const Ready& ready, Reason reason) {
        if (ready()) return;
        Fiber& fiber = fibers_[current_];
        fiber.ready = [](const void* context) { return (*static_cast<const Ready*>(context))(); };
        fiber.context = &ready;
        fiber.reason = reason;
        leave();
    }
    // Lets every other fiber that can go on do so first.
    void rest() {
        fibers_[current_].ready = nullptr;
        leave();
    }
    // A draw for what hardware may do in either order: never without a seed.
    bool coin();

  private:
    int draw(int below);  // 0 without a seed
    struct Fiber {
        ucontext_t registers;
        bool (*ready)(const void*) = nullptr;  // null: may run
        const void* context = nullptr;
        Reason reason = {};
        bool done = true;
    };
    static void enter();
    void leave();
    std::string deadlock() const;

    std::unique_ptr<Fiber[]> fibers_;
    int most_, count_ = 0, current_ = -1;
    char* stacks_;
    ucontext_t scheduler_;
    uint64_t random_ = 0;
    const std::function<void()>* body_ = nullptr;
    std::string error_;
};

// Ends the running block with a message, printf's way.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

}  // namespace fusedformer::cuda::emulator
