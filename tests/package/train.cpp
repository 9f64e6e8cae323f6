#include <knock/train.hpp>

int main() { return knock::data::pre_tokenize("two words").size() == 2 ? 0 : 1; }
