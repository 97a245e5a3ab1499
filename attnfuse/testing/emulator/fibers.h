// Fibers: threads of which one runs until it gives way to another one that it names.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || defined(EMULATED_UCONTEXT)
#define EMULATED_SWITCH_BY_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulated {
namespace {

constexpr size_t STACK_BYTES = 128 << 10;
// Tops of stacks at equal distances would all lie in the same lines of the cache.
constexpr size_t STACK_STRIDE = STACK_BYTES + 17 * 64;
// Left on a stack for what runs on it beside the kernel.
constexpr size_t STACK_SLACK = 16 << 10;

#ifdef EMULATED_SWITCH_BY_UCONTEXT
using Context = ucontext_t;

void switch_stacks(Context* from, Context* to) { swapcontext(from, to); }

void prepare(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = STACK_BYTES;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#else
// The stack pointer; what a called function must keep lies on the stack above it.
using Context = void*;

extern "C" __attribute__((visibility("hidden"))) void emulated_switch_stacks(Context* from, Context to);

asm(R"(
.text
.globl emulated_switch_stacks
.hidden emulated_switch_stacks
.type emulated_switch_stacks, @function
emulated_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch_stacks, . - emulated_switch_stacks
)");

void switch_stacks(Context* from, Context* to) { emulated_switch_stacks(from, *to); }

void prepare(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + STACK_BYTES) & ~uintptr_t{15});
  *--top = nullptr;  // a function starts with its return address at a multiple of 16, less 8
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  *context = top;
}
#endif

}  // namespace
}  // namespace emulated
