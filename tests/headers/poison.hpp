// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Short names that widespread C headers define as macros: a library header must not use them as identifiers.
#define I poisoned by complex.h
#define B0 poisoned by termios.h
#define B50 poisoned by termios.h
#define small poisoned by rpcndr.h
#define near poisoned by windef.h
#define far poisoned by windef.h
#define interface poisoned by objbase.h
#define IN poisoned by windef.h
#define OUT poisoned by windef.h
#define OPTIONAL poisoned by windef.h
#define ERROR poisoned by wingdi.h
#define DELETE poisoned by winnt.h
#define CONST poisoned by windef.h
#define TRUE poisoned by windef.h
#define FALSE poisoned by windef.h
#define DOMAIN poisoned by math.h
#define OVERFLOW poisoned by math.h
#define CHECK poisoned by loggers
#define LOG poisoned by loggers
#define EXPECTS poisoned by loggers

// The toolkit's own headers use these.
#if !defined(__CUDACC__)
#define major poisoned by sys / sysmacros.h
#define minor poisoned by sys / sysmacros.h
#endif
