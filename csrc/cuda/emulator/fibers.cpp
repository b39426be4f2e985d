#include "fibers.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <new>
#include <stdexcept>

namespace fusedformer::cuda::emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
thread_local Fibers* running = nullptr;

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    throw std::runtime_error(text);
}

Fibers::Fibers(int most) : fibers_(new Fiber[most]), most_(most) {
    void* stacks =
        mmap(nullptr, kStack * most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(stacks);
}

Fibers::~Fibers() { munmap(stacks_, kStack * most_); }

int Fibers::draw(int below) {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return static_cast<int>((random_ >> 33) % below);
}

bool Fibers::coin() { return draw(2) == 1; }

void Fibers::enter() {
    Fibers& all = *running;
    try {
        (*all.body_)();
    } catch (const std::exception& error) {
        all.error_ = "thread " + std::to_string(all.current_) + ": " + error.what();
    }
    all.fibers_[all.current_].done = true;
    all.leave();
}

void Fibers::leave() { swapcontext(&fibers_[current_].registers, &scheduler_); }

std::string Fibers::run(int count, uint64_t seed, const std::function<void()>& body) {
    if (count > most_) return "a block of " + std::to_string(count) + " threads";
    count_ = count, random_ = seed, body_ = &body, error_.clear();
    running = this;
    for (int i = 0; i < count; ++i) {
        Fiber& fiber = fibers_[i];
        fiber.done = false, fiber.ready = nullptr;
        getcontext(&fiber.registers);
        fiber.registers.uc_stack = {stacks_ + kStack * i, 0, kStack};
        fiber.registers.uc_link = nullptr;
        makecontext(&fiber.registers, &Fibers::enter, 0);
    }
    // With a seed some neighbours rest until none of the others can go on; then all go on a little, and others rest.
    int first_resting = 0, resting = 0;
    for (int left = count; left > 0;) {
        bool moved = false;
        for (int i = 0; i < count && error_.empty(); ++i) {
            Fiber& fiber = fibers_[i];
            if (fiber.done || (i - first_resting + count) % count < resting) continue;
            current_ = i;
            try {
                if (fiber.ready != nullptr && !fiber.ready(fiber.context)) continue;
            } catch (const std::exception& error) {
                error_ = "thread " + std::to_string(current_) + ": " + error.what();
                break;
            }
            fiber.ready = nullptr;
            moved = true;
            swapcontext(&scheduler_, &fiber.registers);
            left -= fiber.done;
        }
        if (!error_.empty()) break;
        if (!moved && left > 0 && resting == 0) error_ = deadlock();
        if (!error_.empty()) break;
        if (resting == 0)
            first_resting = draw(count), resting = draw(count);
        else if (!moved)
            resting = 0;
    }
    current_ = -1;
    return error_;
}

std::string Fibers::deadlock() const {
    std::map<std::string, std::pair<int, int>> waiting;  // what for: first of them, how many
    for (int i = 0; i < count_; ++i) {
        const Fiber& fiber = fibers_[i];
        if (fiber.done) continue;
        char text[128];
        std::snprintf(text, sizeof(text), fiber.reason.format, fiber.reason.first, fiber.reason.second);
        ++waiting.try_emplace(text, i, 0).first->second.second;
    }
    std::string message = "deadlock";
    for (const auto& [text, who] : waiting)
        message +=
            "; " + std::to_string(who.second) + " threads from " + std::to_string(who.first) + " on wait for " + text;
    return message;
}

}  // namespace fusedformer::cuda::emulator
