// Opens and closes a region that is compiled for a higher instruction set than the rest of the program.
//
// Include it, and everything else, before the region: a header's inline functions compiled inside it could be the copy that the
// linker keeps for everyone, and would then crash older processors. For the same reason no std:: template is used inside.
#pragma once

#define QHUB_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QHUB_ISA_BEGIN(features) QHUB_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QHUB_ISA_END QHUB_PRAGMA(clang attribute pop)
#else
#define QHUB_ISA_BEGIN(features) QHUB_PRAGMA(GCC push_options) QHUB_PRAGMA(GCC target(features))
#define QHUB_ISA_END QHUB_PRAGMA(GCC pop_options)
#endif
