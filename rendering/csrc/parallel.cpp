#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace rendering {

namespace {

struct Loop {
  const std::function<void(int64_t)>& body;
  const int64_t count;
  std::atomic<int64_t> next{0};
  // Guarded by the pool's mutex.
  int helpers_wanted;
  int helpers_active = 0;
  std::exception_ptr error{};

  void work(std::mutex& mutex) {
    try {
      for (int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  void run(Loop& loop) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (current_) {  // another Python thread has the pool
      lock.unlock();
      loop.work(mutex_);
      return;
    }
    for (; threads_ < loop.helpers_wanted; ++threads_) std::thread([this] { help(); }).detach();
    current_ = &loop;
    lock.unlock();
    work_.notify_all();
    loop.work(mutex_);
    lock.lock();
    current_ = nullptr;  // nobody joins any more
    done_.wait(lock, [&] { return loop.helpers_active == 0; });
  }

 private:
  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      work_.wait(lock, [&] { return current_ && current_->helpers_wanted > 0; });
      Loop& loop = *current_;
      --loop.helpers_wanted;
      ++loop.helpers_active;
      lock.unlock();
      loop.work(mutex_);
      lock.lock();
      --loop.helpers_active;
      done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  Loop* current_ = nullptr;
  int threads_ = 0;
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  // Never destroyed: its sleeping threads outlive every static object.
  static Pool& pool = *new Pool;
  Loop loop{body, count, {0}, static_cast<int>(std::min<int64_t>(threads, count)) - 1};
  if (loop.helpers_wanted > 0) {
    pool.run(loop);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace rendering
