// runner write FILE: one schedule, its outputs into FILE. runner check FILE: every schedule, the same bits?
#include "runner.h"

#include <cstdio>
#include <fstream>
#include <iterator>

#include "control.h"

namespace {

struct Schedule {
  int order, timing;
  std::uint64_t seed;
};

using namespace ttt::emulation;
constexpr Schedule kSchedules[] = {
    {kForward, kLate, 0},        {kReverse, kLate, 0},        {kForward, kEarly, 0},
    {kReverse, kEarly, 0},       {kRandomOrder, kLate, 1},    {kRandomOrder, kEarly, 2},
    {kRandomOrder, kRandomTiming, 3}, {kForward, kRandomTiming, 4}, {kReverse, kRandomTiming, 5},
};

bool run(const Schedule& schedule, ttt::tests::Outputs& outputs) {
  set_schedule(schedule.order, schedule.timing, schedule.seed);
  const std::string error = ttt::tests::run_problem(outputs);
  if (error.empty()) return true;
  std::printf("order %d, timing %d: %s\n", schedule.order, schedule.timing, error.c_str());
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  ttt::tests::Outputs outputs;
  if (argv[1] == std::string("write")) {
    if (!run(kSchedules[0], outputs)) return 1;
    std::ofstream file(argv[2], std::ios::binary);
    file.write(reinterpret_cast<const char*>(outputs.data()), static_cast<std::streamsize>(outputs.size()));
    return file ? 0 : 1;
  }
  std::ifstream file(argv[2], std::ios::binary);
  const ttt::tests::Outputs expected{std::istreambuf_iterator<char>(file), {}};
  for (const Schedule& schedule : kSchedules) {
    outputs.clear();
    if (!run(schedule, outputs)) return 1;
    if (outputs != expected) {
      std::printf("order %d, timing %d: wrong result\n", schedule.order, schedule.timing);
      return 1;
    }
  }
  return 0;
}
