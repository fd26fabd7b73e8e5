(** What steering the MLP input can reach

    To first order a steer v at mlp_in moves the MLP output by A v with A = W_d J
    (theorem [shift_mlp_inE] of glu_expansion.v).

    Claims.
      - A target shift is reached by some v exactly when it lies in col(A), hence
        only when it lies in col(W_d); the second part holds to all orders.
      - Every target is reached exactly when the rank of A is the number of its rows.
        With n >= d and W_d of full row rank that is the usual case: for one token
        "unreachable directions" are then none, to first order.
      - One v for a batch of tokens must solve the stacked system.
      - If the target is p + w with p in col(W_d) and w orthogonal to col(W_d), then
        ||p + w - A v||^2 = ||p - A v||^2 + ||w||^2 whatever v is: w is never reached.

    Not said here.  When W_d has full row rank (the usual case: n > d) there is no
    such w, and the restriction is empty for a single token, to first order.  Where A
    is ill-conditioned v is large, and the first order says little about it. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_expansion.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Reach.
Variables (F : fieldType) (d n o : nat).
Variables (Wd : 'M[F]_(o, n)) (J : 'M[F]_(n, d)).
Let A := Wd *m J.

(** A shift p is reached by some steer exactly when p lies in col(A). *)
Theorem reachable_iff (p : 'cV_o) :
  (exists v : 'cV_d, p = A *m v) <-> in_colspan p A.
Proof. by split=> [?|?]; exact/colspanP. Qed.

(** Every target is reached exactly when A has full row rank. *)
Theorem all_reachable_iff :
  (forall p : 'cV_o, exists v : 'cV_d, p = A *m v) <-> \rank A = o.
Proof.
split=> [all|full p]; last first.
  have Af : row_free A by rewrite /row_free full.
  by exists (pinvmx A *m p); rewrite mulmxA mulmxVp // mul1mx.
apply/eqP; rewrite eqn_leq rank_leq_row /=.
have [X AX] : exists X, A *m X = 1%:M.
  have unit j := all (delta_mx j 0).
  have /fin_all_exists[v vE] : forall j : 'I_o, exists v : 'cV_d, delta_mx j 0 = A *m v.
    by move=> j; exact: unit.
  exists (\matrix_(i, j) v j i 0); apply/matrixP=> i j.
  have := congr1 (fun w : 'cV_o => w i 0) (vE j); rewrite !mxE eqxx andbT => ->.
  by apply: eq_bigr => k _; rewrite mxE.
by rewrite -[X in (X <= _)%N](mxrank1 F) -AX mxrankM_maxl.
Qed.

(** A reached shift lies in col(W_d). *)
Theorem reachable_in_down (p : 'cV_o) v : p = A *m v -> in_colspan p Wd.
Proof. by move=> ->; apply/colspanP; exists (J *m v); rewrite mulmxA. Qed.

(** To all orders: whatever v is, y(u + v) - y(u) lies in col(W_d). *)
Theorem exact_shift_in_down (phi : F -> F) (Wg Wu : 'M[F]_(n, d)) u v :
  in_colspan (glu phi Wg Wu Wd (u + v) - glu phi Wg Wu Wd u) Wd.
Proof. by rewrite -mulmxBr; apply/colspanP; eexists. Qed.

(** One steer for T tokens: v solves A_k v = p_k for all k exactly when the stacked
    target lies in the column space of the stacked matrices. *)
Theorem reachable_batch T (As : 'I_T -> 'M[F]_(o, d)) (p : 'I_T -> 'cV[F]_o) :
  (exists v, forall k, p k = As k *m v)
    <-> in_colspan (\mxcol_k p k) (\mxcol_k As k).
Proof.
split=> [[v pE]|/colspanP[v pE]].
  by apply/colspanP; exists v; rewrite mxcol_mul; apply: eq_mxcol.
by exists v; move: pE; rewrite mxcol_mul => /eq_mxcolP.
Qed.
End Reach.

Section Orthogonal.
Variables (R : realFieldType) (d n o : nat).
Variables (Wd : 'M[R]_(o, n)) (J : 'M[R]_(n, d)).
Let A := Wd *m J.

(** The part w of the target orthogonal to col(W_d) stays in the error, in full. *)
Theorem orthogonal_part_stays (p w : 'cV_o) v :
    in_colspan p Wd -> Wd^T *m w = 0 ->
  sqn (p + w - A *m v) = sqn (p - A *m v) + sqn w.
Proof.
case/colspanP=> x -> w0; rewrite addrAC -mulmxA -mulmxBr sqnD_orth //.
by rewrite /dot trmx_mul -mulmxA w0 mulmx0 mxE.
Qed.
End Orthogonal.
