#include "tma.h"

#include <cstring>

#include "cta.h"

namespace fusedformer::cuda {

const char* make_tensor_map(TensorMap& map, const Tensor4& x, int batch, int heads, int rows, int features, bool,
                            int box_rows) {
    map.data = static_cast<char*>(x.data);
    const int64_t strides[4] = {1, x.row_stride, x.head_stride, x.batch_stride};
    const int sizes[4] = {features, rows, heads, batch};
    bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
    for (int i = 0; i < 4; ++i) {
        map.strides[i] = strides[i] * 2, map.sizes[i] = sizes[i];
        aligned = aligned && sizes[i] >= 1 && (i == 0 || sizes[i] == 1 || (strides[i] >= 0 && strides[i] % 8 == 0));
    }
    map.box_rows = box_rows;
    return aligned ? nullptr : "cuTensorMapEncodeTiled refused a tensor: its data or strides are not aligned";
}

namespace emulator {
namespace {

constexpr int kRowBytes = 128;  // 64 features

// Calls visit(address of 16 bytes in the panel, address in the tensor or null, bytes of them inside) for a box.
template <typename Visit>
void each_chunk(const TensorMap& map, uint32_t panel, const int (&place)[4], const Visit& visit) {
    for (int row = 0; row < map.box_rows; ++row)
        for (int chunk = 0; chunk < 8; ++chunk) {
            const uint32_t plain = panel + row * kRowBytes + chunk * 16;
            const uint32_t swizzled = plain ^ ((plain >> 7 & 7) << 4);
            const int at[4] = {place[0] + chunk * 8, place[1] + row, place[2], place[3]};
            bool inside = true;
            char* source = map.data;
            for (int i = 0; i < 4; ++i) {
                inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
                source += at[i] * map.strides[i];
            }
            const int features = map.sizes[0] - at[0];
            visit(swizzled, inside ? source : nullptr, inside ? (features < 8 ? features : 8) * 2 : 0);
        }
}

uint32_t panel_offset(const TensorMap& map, const void* panel) {
    if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) fail("a tensor map that is not aligned");
    const uint32_t offset = block().offset_of(panel, map.box_rows * kRowBytes);
    if (offset % 1024 != 0) fail("a panel at %u of shared memory, not a multiple of 1024", offset);
    return offset;
}

void land(const PendingLoad& load) {
    Block& b = block();
    if (load.source != nullptr) {
        std::memcpy(b.shared + load.panel, load.source, load.bytes);
        std::memcpy(b.async_view.data() + load.panel, load.source, load.bytes);
        return barrier_bytes_came(load.bar, load.bytes);
    }
    each_chunk(load.map, load.panel, load.place, [&](uint32_t to, const char* from, int bytes) {
        char chunk[16] = {};
        if (bytes > 0) std::memcpy(chunk, from, bytes);
        std::memcpy(b.shared + to, chunk, 16);
        std::memcpy(b.async_view.data() + to, chunk, 16);
    });
    barrier_bytes_came(load.bar, load.map.box_rows * kRowBytes);
}

uint32_t bytes_offset(const void* global, const void* shared, int bytes) {
    const uint32_t offset = block().offset_of(shared, bytes);
    if ((reinterpret_cast<uintptr_t>(global) | offset | static_cast<uint32_t>(bytes)) % 16 != 0)
        fail("a bulk copy of %d bytes at %u of shared memory and %p", bytes, offset, global);
    return offset;
}

void start(const PendingLoad& load, int bytes) {
    Block& b = block();
    // From here on what was there may be gone.
    std::memset(b.shared + load.panel, 0xFF, bytes);
    std::memset(b.async_view.data() + load.panel, 0xFF, bytes);
    if (b.fibers.coin())
        land(load);
    else
        b.loads.push_back(load);
}

void start(const PendingStore& store) {
    std::vector<StoreGroup>& groups = block().self().stores;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back(store);
}

}  // namespace

void load(void* panel, const TensorMap& map, uint64_t* bar, int feature, int row, int head, int batch) {
    start({bar, map, panel_offset(map, panel), {feature, row, head, batch}}, map.box_rows * kRowBytes);
}

void bulk_load(void* destination, const void* source, int bytes, uint64_t* bar) {
    const uint32_t offset = bytes_offset(source, destination, bytes);
    start({bar, {}, offset, {}, static_cast<const char*>(source), bytes}, bytes);
}

void land_loads(const uint64_t* bar) {
    std::vector<PendingLoad> others;
    std::vector<PendingLoad> all = std::move(block().loads);
    for (const PendingLoad& load : all)
        if (load.bar == bar)
            land(load);
        else
            others.push_back(load);
    block().loads = std::move(others);
}

void store(const TensorMap& map, const void* panel, int feature, int row, int head, int batch) {
    start({map, panel_offset(map, panel), {feature, row, head, batch}});
}

void bulk_store(void* destination, const void* source, int bytes, bool add) {
    const uint32_t offset = bytes_offset(destination, source, bytes);
    start({{}, offset, {}, static_cast<char*>(destination), bytes, add});
}

void commit_stores() { block().self().stores.emplace_back(); }

namespace {

void finish(std::vector<StoreGroup>& groups, size_t keep) {
    const auto read = [](uint32_t from, char* to, int bytes, bool add) {
        const char* source = block().async_view.data() + from;
        if (bytes > 0) block().self().writes.push_back({to, {source, source + bytes}, add});
    };
    for (; groups.size() > keep; groups.erase(groups.begin()))
        for (const PendingStore& store : groups.front())
            if (store.destination != nullptr)
                read(store.panel, store.destination, store.bytes, store.add);
            else
                each_chunk(store.map, store.panel, store.place,
                           [&](uint32_t from, char* to, int bytes) { read(from, to, bytes, false); });
}

void write(const PendingWrite& pending) {
    if (!pending.add) {
        std::memcpy(pending.destination, pending.bytes.data(), pending.bytes.size());
        return;
    }
    for (size_t i = 0; i < pending.bytes.size(); i += sizeof(float)) {
        float sum, x;
        std::memcpy(&sum, pending.destination + i, sizeof(float));
        std::memcpy(&x, pending.bytes.data() + i, sizeof(float));
        sum += x;
        std::memcpy(pending.destination + i, &sum, sizeof(float));
    }
}

}  // namespace

void wait_for_stores(int pending) { finish(block().self().stores, pending + 1); }

void wait_for_writes() {
    wait_for_stores(0);
    for (const PendingWrite& pending : block().self().writes) write(pending);
    block().self().writes.clear();
}

void finish_stores() {
    finish(block().self().stores, 0);
    wait_for_writes();
}

void check_written() {
    const Thread& self = block().self();
    if (!self.writes.empty() || self.stores.size() > 1) fail("a flag raised before the thread's stores are written");
}

}  // namespace emulator
}  // namespace fusedformer::cuda
