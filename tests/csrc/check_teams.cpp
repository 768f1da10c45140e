// Solves small matrices with teams of threads and with a team of one, and compares.
//   check_teams [number of a barrier to leave out]
// Exits with 1 where they differ; under ThreadSanitizer with its own code where threads race.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "jacobi.h"
#include "spectrum.h"
#include "thread_team.h"

using namespace featkd;
using namespace featkd::portable;

namespace {

using One = TeamOfOne<16, 2, 2>;
constexpr int MOST = 40;

struct Results {
  double values[MOST], curve[MOST], residual;
  int64_t ranks[2];
  int32_t info, resolved;
};

template <class Scratch>
std::vector<uint64_t> poisoned(int n, int groups) {  // every number of it is a NaN
  return std::vector<uint64_t>(Scratch::bytes(n, groups) / 8 + 8, 0x7fffffff7fffffffull);
}

void* aligned(std::vector<uint64_t>& memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

template <class Real>
Results with_threads(Problem p, int size, int dropped) {
  using S = Scratch<ThreadTeam, Real>;
  Results out{};
  auto memory = poisoned<S>(p.rows, size);
  p.values = out.values, p.curve = out.curve, p.ranks = out.ranks, p.info = &out.info;
  p.residual = &out.residual, p.resolved = &out.resolved;
  run_team(size, dropped, [&](const ThreadTeam& team) {
    for (int repeat = 0; repeat < 2; repeat++) {  // one matrix after the other in the same memory
      const auto found = solve(team, p, 0, S(aligned(memory), p.rows, size));
      if (team.rank() == 0) out.resolved = write_results(p, 0, found);
    }
  });
  return out;
}

template <class Real>
Results alone(Problem p) {
  using S = Scratch<One, Real>;
  Results out{};
  auto memory = poisoned<S>(p.rows, 1);
  p.values = out.values, p.curve = out.curve, p.ranks = out.ranks, p.info = &out.info;
  p.residual = &out.residual, p.resolved = &out.resolved;
  out.resolved = write_results(p, 0, solve(One(), p, 0, S(aligned(memory), p.rows, 1)));
  return out;
}

template <class Real>
int compare(const Problem& p, const char* name, int dropped) {
  int wrong = 0;
  const Results expected = alone<Real>(p);
  for (int size : {2, 3}) {
    const Results found = with_threads<Real>(p, size, dropped);
    const double bound = sizeof(Real) == 4 ? 4e-6 : 1e-13;
    bool same = found.info == expected.info;
    for (int i = 0; i < p.rows && found.info == SOLVED; i++)
      same &=
          std::fabs(found.curve[i] - expected.curve[i]) <= bound &&
          std::fabs(found.values[i] * found.values[i] - expected.values[i] * expected.values[i]) <=
              bound * expected.values[0] * expected.values[0];
    if (!same) std::printf("%s: %d threads differ from one\n", name, size);
    wrong += !same;
  }
  return wrong;
}

// One-sided Jacobi of a matrix's rows: the same sums in the same order, so the very same results.
template <class Real>
int compare_turns(const std::vector<double>& x, int n, int columns, const char* name, int dropped) {
  const int length = (columns + 15) / 16 * 16;
  const size_t size = size_t(n) * length;
  const auto turn = [&](auto team, Real* rows, Real* turns, void* memory) {
    using Team = decltype(team);
    const JacobiScratch<Team, Real> scratch(memory, team.size());
    int sweeps = 0;
    for (int repeat = 0; repeat < 2; repeat++)  // what is orthogonal stays so
      sweeps = 100 * sweeps + jacobi(team, Band<Real>{rows, turns, n, length}, scratch);
    return sweeps;
  };
  const auto filled = [&](std::vector<uint64_t>& memory) {
    Real* rows = static_cast<Real*>(aligned(memory));
    std::memset(rows, 0, size * sizeof(Real));
    for (int i = 0; i < n; i++)
      for (int k = 0; k < columns; k++) rows[i * length + k] = Real(x[size_t(i) * columns + k]);
    return rows;
  };
  const std::vector<uint64_t> poison(2 * size + 8, 0x7fffffff7fffffffull);
  auto expected = poison;
  Real* rows = filled(expected);
  auto memory = poisoned<JacobiScratch<One, Real>>(length, 1);
  const int sweeps = turn(One(), rows, rows + size, aligned(memory));
  int wrong = 0;
  for (int groups : {2, 3}) {
    auto found = poison;
    Real* own = filled(found);
    auto shared = poisoned<JacobiScratch<ThreadTeam, Real>>(length, groups);
    std::vector<int> each(groups);
    run_team(groups, dropped, [&](const ThreadTeam& team) {
      each[team.rank()] = turn(team, own, own + size, aligned(shared));
    });
    bool same = !std::memcmp(own, rows, 2 * size * sizeof(Real));
    for (int count : each) same &= count == sweeps;
    if (!same) std::printf("turns of %s: %d threads differ from one\n", name, groups);
    wrong += !same;
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const int dropped = argc > 1 ? std::atoi(argv[1]) : -1;
  const double thresholds[2] = {0.8, 0.99};
  int wrong = 0;
  uint32_t state = 1;
  const auto random = [&] {
    state = state * 1664525u + 1013904223u;
    return double(state >> 8) / (1 << 24) - 0.5;
  };
  const int shapes[][2] = {{1, 3}, {2, 2}, {3, 9}, {17, 20}, {26, 30}};
  for (const auto& [rows, columns] : shapes)
    for (const char* name : {"random", "diagonal", "zero column", "repeated", "zero", "bad"}) {
      std::vector<double> x(size_t(rows) * columns);
      for (int i = 0; i < rows; i++)
        for (int k = 0; k < columns; k++) {
          double& each = x[size_t(i) * columns + k];
          each = random();
          if (!std::strcmp(name, "diagonal")) each = i == k ? 1 + i % 3 : 0;
          if (!std::strcmp(name, "zero column") && (i % 3 == 0 || k == 1)) each = 0;
          if (!std::strcmp(name, "repeated")) each = i == k;
          if (!std::strcmp(name, "zero")) each = 0;
        }
      if (!std::strcmp(name, "bad")) x.back() = NAN;
      Problem p{};
      p.data = x.data(), p.type = Type::f64, p.batch = 1, p.rows = rows, p.columns = columns;
      p.row_stride = columns, p.column_stride = 1;
      p.thresholds = thresholds, p.threshold_count = 2;
      wrong += compare<float>(p, name, dropped) + compare<double>(p, name, dropped);
      std::vector<double> turned(x.size());
      for (int i = 0; i < rows; i++)
        for (int k = 0; k < columns; k++) turned[size_t(k) * rows + i] = x[size_t(i) * columns + k];
      p.data = turned.data(), p.row_stride = 1, p.column_stride = rows;
      wrong += compare<double>(p, name, dropped);
      if (std::strcmp(name, "bad")) wrong += compare_turns<double>(x, rows, columns, name, dropped);
    }
  std::printf("%d differences\n", wrong);
  return wrong != 0;
}
