// Calls kernels that are linked into it, as a job on the standard input says, and writes every
// buffer back: how kernels of another architecture are run under an emulator (emulated.py).
//
// A job, in whole numbers of 64 bits: index in `table`, splits, last_only, T, S, R, P, the number
// of buffers, their sizes in bytes, the number of operands, each operand's buffer and its offset;
// then the buffers' bytes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct Sizes { int64_t T, S, R, P; };
typedef void (*Run)(const Sizes*, void* const*, int64_t, int64_t);
struct Entry {
  int64_t (*items)(const Sizes*);
  Run run;
  int64_t (*finish_items)(const Sizes*, void* const*);  // null when there is one phase
  Run finish;
};
extern const Entry table[];

static int64_t number() {
  int64_t value;
  if (fread(&value, sizeof(value), 1, stdin) != 1) exit(0);  // no further job
  return value;
}

static void share(Run run, const Sizes* n, void* const* p, int64_t items, int64_t splits,
                  bool last) {
  if (last) return run(n, p, items - 1, items);
  for (int64_t i = 0; i < splits; ++i)
    run(n, p, items * i / splits, items * (i + 1) / splits);
}

int main() {
  for (;;) {
    const Entry& kernel = table[number()];
    const int64_t splits = number();
    const bool last = number() != 0;
    Sizes n{number(), number(), number(), number()};
    std::vector<int64_t> sizes(number());
    for (int64_t& size : sizes) size = number();
    std::vector<std::pair<int64_t, int64_t>> places(number());
    for (auto& place : places) place.first = number(), place.second = number();
    std::vector<char*> buffers;
    for (int64_t size : sizes) {
      buffers.push_back((char*)aligned_alloc(64, (size + 127) / 64 * 64));
      if (fread(buffers.back(), 1, size, stdin) != (size_t)size) return 2;
    }
    std::vector<void*> p;
    for (auto& place : places) p.push_back(buffers[place.first] + place.second);
    const int64_t items = kernel.items(&n);
    share(kernel.run, &n, p.data(), items, splits, last && !kernel.finish);
    if (kernel.finish) {
      const int64_t rest = kernel.finish_items(&n, p.data());
      share(kernel.finish, &n, p.data(), rest, splits, last && rest > 0);
    }
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (fwrite(buffers[i], 1, sizes[i], stdout) != (size_t)sizes[i]) return 3;
      free(buffers[i]);
    }
  }
}
