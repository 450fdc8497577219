#pragma once

#include "../fused_add.h"

namespace rdp::cpu {

void fused_add_forward(const FusedAddForward& call);
void fused_add_backward(const FusedAddBackward& call);

}  // namespace rdp::cpu
