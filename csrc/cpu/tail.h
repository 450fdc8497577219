#pragma once

#include "../tail.h"

namespace rdp::cpu {

void tail_forward(const TailForward& call);
void tail_backward(const TailBackward& call);

}  // namespace rdp::cpu
