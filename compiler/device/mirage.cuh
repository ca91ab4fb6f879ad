// All of the device library that a generated kernel needs.
#pragma once
#include "generate.cuh"
#include "repack.cuh"
