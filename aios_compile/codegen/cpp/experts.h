// What the products of a mixture of experts share.
#pragma once
#include "prelude.h"

// The expert that an id means among COUNT: ids below 0 count from the end, all are clamped.
template <int64_t COUNT> AIOS_INLINE int64_t expert_of(int64_t id) {
  return min(max(id < 0 ? id + COUNT : id, (int64_t)0), COUNT - 1);
}
