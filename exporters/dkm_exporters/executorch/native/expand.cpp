/// Expands a file of packed weights to the `.ptd` file that a program needs; see lut_weights.h.
///
///   dkm_expand WEIGHTS.lut OUT.ptd
///
/// Returns 0, 1 if it failed, which leaves OUT.ptd as it was and says why in one line of stderr,
/// or 2 for wrong arguments.

#include <cstdio>

#include "lut_weights.h"

int main(int count, char** words) {
  if (count != 3) {
    std::fputs("usage: dkm_expand WEIGHTS.lut OUT.ptd\n", stderr);
    return 2;
  }
  const dkm::WeightsError error = dkm::expand_weights_file(words[1], words[2]);
  if (error == dkm::WeightsError::kOk) return 0;
  std::fprintf(stderr, "dkm_expand: %s to %s: %s\n", words[1], words[2], dkm::describe(error));
  return 1;
}
