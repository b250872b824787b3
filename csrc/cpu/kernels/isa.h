// Included by every file of this folder: they are compiled once per instruction set, with APEX_ISA = default | avx2 |
// avx512.
#pragma once

#define APEX_CONCATENATE_(a, b) a##b
#define APEX_CONCATENATE(a, b) APEX_CONCATENATE_(a, b)
#define APEX_STRING_(a) #a
#define APEX_STRING(a) APEX_STRING_(a)

// The same template compiled for two instruction sets must not share a symbol.
#define APEX_ISA_NAMESPACE APEX_CONCATENATE(isa_, APEX_ISA)
