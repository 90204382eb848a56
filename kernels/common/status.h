/* How an operation's end crosses the C line: a status, and a sentence that belongs to the calling thread. */
#pragma once
#include <exception>
#include <new>
#include <string>

#include "common/check.h"

namespace lmi {

inline std::string &last_message() {
  static thread_local std::string message;
  return message;
}

/* Runs fn and tells how it went. Nothing leaves as an exception. */
template <class Function>
lmi_status guard(const char *operation, Function fn) {
  try {
    fn();
    return LMI_OK;
  } catch (const Error &error) {
    last_message() = std::string(operation) + ": " + error.what();
    return error.status;
  } catch (const std::bad_alloc &) {
    last_message() = std::string(operation) + ": out of memory for scratch";
    return LMI_DEVICE_ERROR;
  } catch (const std::exception &error) {
    last_message() = std::string(operation) + ": " + error.what();
    return LMI_DEVICE_ERROR;
  }
}

}  // namespace lmi
