// Compares results of teams of several threads with those of a single thread, on small matrices.
//   check_teams [number of a barrier to skip]
// Exits with 1 if they differ. ThreadSanitizer exits with its own code if threads race.
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
constexpr int MAX_ROWS_TESTED = 40;

struct Results {
  double values[MAX_ROWS_TESTED], curve[MAX_ROWS_TESTED], residual;
  int64_t ranks[2];
  int32_t info, resolved;
};

template <class Scratch>
std::vector<uint64_t> poisoned(int n, int groups) {  // filled with NaN
  return std::vector<uint64_t>(Scratch::bytes(n, groups) / 8 + 8, 0x7fffffff7fffffffull);
}

void* aligned(std::vector<uint64_t>& memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

template <class Real>
Results solve_with_team(Problem p, int size, int skipped) {
  using S = Scratch<ThreadTeam, Real>;
  Results out{};
  auto memory = poisoned<S>(p.rows, size);
  p.values = out.values, p.curve = out.curve, p.ranks = out.ranks, p.info = &out.info;
  p.residual = &out.residual, p.resolved = &out.resolved;
  run_team(size, skipped, [&](const ThreadTeam& team) {
    for (int repeat = 0; repeat < 2; repeat++) {  // two matrices in the same scratch memory
      const auto found = solve(team, p, 0, S(aligned(memory), p.rows, size));
      if (team.rank() == 0) out.resolved = write_results(p, 0, found);
    }
  });
  return out;
}

template <class Real>
Results solve_with_one_thread(Problem p) {
  using S = Scratch<One, Real>;
  Results out{};
  auto memory = poisoned<S>(p.rows, 1);
  p.values = out.values, p.curve = out.curve, p.ranks = out.ranks, p.info = &out.info;
  p.residual = &out.residual, p.resolved = &out.resolved;
  out.resolved = write_results(p, 0, solve(One(), p, 0, S(aligned(memory), p.rows, 1)));
  return out;
}

template <class Real>
int compare(const Problem& p, const char* name, int skipped) {
  int wrong = 0;
  const Results expected = solve_with_one_thread<Real>(p);
  for (int size : {2, 3}) {
    const Results found = solve_with_team<Real>(p, size, skipped);
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

// One-sided Jacobi. Teams add up the same terms in the same order, so results are bitwise equal.
template <class Real>
int compare_jacobi(const std::vector<double>& x, int n, int columns, const char* name,
                   int skipped) {
  const int length = (columns + 15) / 16 * 16;
  const size_t size = size_t(n) * length;
  const auto run_jacobi = [&](auto team, Real* rows, Real* rotations, void* memory) {
    using Team = decltype(team);
    const JacobiScratch<Team, Real> scratch(memory, team.size());
    int sweeps = 0;
    for (int repeat = 0; repeat < 2; repeat++)  // the second run finds orthogonal rows
      sweeps = 100 * sweeps + jacobi(team, Band<Real>{rows, rotations, n, length}, scratch);
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
  const int sweeps = run_jacobi(One(), rows, rows + size, aligned(memory));
  int wrong = 0;
  for (int groups : {2, 3}) {
    auto found = poison;
    Real* own = filled(found);
    auto shared = poisoned<JacobiScratch<ThreadTeam, Real>>(length, groups);
    std::vector<int> each(groups);
    run_team(groups, skipped, [&](const ThreadTeam& team) {
      each[team.rank()] = run_jacobi(team, own, own + size, aligned(shared));
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
  const int skipped = argc > 1 ? std::atoi(argv[1]) : -1;
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
      wrong += compare<float>(p, name, skipped) + compare<double>(p, name, skipped);
      std::vector<double> transposed(x.size());
      for (int i = 0; i < rows; i++)
        for (int k = 0; k < columns; k++)
          transposed[size_t(k) * rows + i] = x[size_t(i) * columns + k];
      p.data = transposed.data(), p.row_stride = 1, p.column_stride = rows;
      wrong += compare<double>(p, name, skipped);
      if (std::strcmp(name, "bad"))
        wrong += compare_jacobi<double>(x, rows, columns, name, skipped);
    }
  std::printf("%d differences\n", wrong);
  return wrong != 0;
}
